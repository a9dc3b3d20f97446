"""Fields of dataclasses read from source, through imports, without importing anything."""

import ast
import sys
from pathlib import Path

from workbench.launcher.jobs import find_jobs
from workbench.launcher.signatures import REQUIRED, Parameter, parameters_of


def test_fields_of_dataclasses_are_read_without_importing_them(pruning: Path) -> None:
    levels, rewind, exact, terms, modes = find_jobs()["prune_in_steps"].parameters
    steps = (
        Parameter("count", "int | None", "None", "How many, see :func:`a.b` and ``c``."),
        Parameter("rate", "float", "0.2", "Share of each."),
        Parameter("names", "list[str]", "list()", ""),
    )
    assert levels == Parameter("levels", "int | Steps | None", "None", "How far.", steps)
    assert exact == Parameter("exact", "Steps", "Steps()", "", steps)
    assert [field.name for field in terms.fields] == ["NAME.count", "NAME.rate", "NAME.names"]
    assert rewind.fields == (
        Parameter("at", "Duration", REQUIRED, "When."),
        Parameter("mode", "Literal['all', 'weights']", "'all'", "What."),
        Parameter("inner", "Steps | None", "None", "", steps),
    )
    assert modes.annotation == "list[Literal['all', 'weights']] | Rewind | None", "an alias says its values"
    assert not [name for name in sys.modules if name.startswith("package_of_pruning")]


def test_a_dataclass_of_itself_and_a_module_that_cannot_be_read_end(pruning: Path) -> None:
    (pruning / "steps.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Steps:\n    more: 'Steps | None' = None\n"
    )
    (pruning / "rewinding.py").write_text("def (")
    function = ast.parse("def f(a: Steps, b: Rewind, c: nn.Module, d: Missing): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    first, *others = parameters_of(function, "package_of_pruning")
    depth, field = 0, first
    while field.fields:
        (field,) = field.fields
        depth += 1
    assert depth == 1
    assert [other.fields for other in others] == [(), (), ()]
