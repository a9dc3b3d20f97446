"""What a definition uses is followed; what it does not use, and how it is written, does not count."""

import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workbench.definitions.conftest import Edit
from workbench.definitions import definitions, definitions_of, difference


def change(edit: Edit, *edits: str) -> str:
    """What is said of ``net.Net`` after an edit."""
    before = definitions(["net.Net"])
    edit(*edits)  # type: ignore[arg-type]
    return difference(before, definitions(["net.Net"]))


def test_all_that_is_used_is_found(project: Edit) -> None:
    found = definitions(["net.Net"])
    assert {module: list(each) for module, each in found.items()} == {
        "helpers": ["inner", "left", "scale"],
        "inside": ["act", "make"],
        "net": ["Net", "Net.__init__", "Net.forward", "WIDTH"],
        "patches": ["registered", "what it does when it is imported"],
        "sub.deep": ["Deep"],
        "sub.sizes": ["IN", "OUT"],
    }
    assert "net" not in sys.modules, "nothing is imported"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("net.py", "return act(", "return 2 * act("), "net.py has changed: Net.forward"),
        (("net.py", "WIDTH = 4", "WIDTH = 5"), "net.py has changed: WIDTH"),
        (("net.py", "width = WIDTH", "width = 2 * WIDTH"), "net.py has changed: Net"),
        (("net.py", "    def forward", "    def extra(self):\n        pass\n\n    def forward"),
         "net.py has changed: Net.extra is used only now"),
        (("helpers.py", "x + 1", "x + 2"), "helpers.py has changed: inner"),
        (("inside.py", "return n", "return -n"), "inside.py has changed: make"),
        (("patches.py", ".append", ".remove"), "patches.py has changed: what it does when it is imported"),
        (("sub/deep.py", "sizes.IN", "2 * sizes.IN"), "sub/deep.py has changed: Deep"),
        (("sub/sizes.py", "OUT = 4", "OUT = 9"), "sub/sizes.py has changed: OUT"),
        (("net.py", "helpers.scale(x)", "x"), "helpers.py has changed: inner is used no longer, scale is used no longer"
         "; net.py has changed: Net.forward"),
    ],
)  # fmt: skip
def test_what_it_uses_counts(project: Edit, edit: tuple[str, str, str], said: str) -> None:
    assert change(project, *edit) == said


@pytest.mark.parametrize(
    "edit",
    [
        ("net.py", "# a comment", "# another\n\n"),
        ("net.py", '"""A net."""', '"""Another net,\n\n    described."""'),
        ("net.py", '    """A net."""\n', ""),
        ("net.py", "act(helpers.scale(x))", "act(\n            helpers.scale(x),\n        )"),
        ("net.py", "UNUSED = 1", "UNUSED = 2"),
        ("net.py", "def other(x):\n    return x", "def other(x):\n    return -x"),
        ("sub/sizes.py", "REST = 5", "REST = 6"),
    ],
)
def test_what_it_does_not_use_and_how_it_is_written_does_not(project: Edit, edit: tuple[str, str, str]) -> None:
    assert change(project, *edit) == ""


LEFT = ("helpers.py", "left(x):\n    return x", "left(x):\n    return -x")
ACT = ("inside.py", "def act(x):\n    return x", "def act(x):\n    return -x")
REST = ("sub/sizes.py", "REST = 5", "REST = 6")
UNUSED = ("net.py", "UNUSED = 1", "UNUSED = 2")


@pytest.mark.parametrize(
    ("code", "edit", "said"),
    [
        ("TABLE = {}\nTABLE['f'] = act\ndef go():\n    return TABLE['f']", ACT, "inside.py has changed: act"),
        ("def go():\n    from helpers import left\n    return left", LEFT, "helpers.py has changed: left"),
        ("import sub.sizes\ndef go():\n    return sub.sizes.REST", REST, "sub/sizes.py has changed: REST"),
        ("import sub.sizes as s\ndef go():\n    return vars(s)", REST, "sub/sizes.py has changed: REST"),
        ("def go():\n    return globals()['UNUSED']", UNUSED, "net.py has changed: UNUSED"),
        ("if WIDTH:\n    SIZE = 1\nelse:\n    SIZE = 2\ndef go():\n    return SIZE", ("net.py", "SIZE = 2", "SIZE = 3"),
         "net.py has changed: SIZE"),
        ("def deco(f):\n    return f\n@deco\ndef go():\n    pass", ("net.py", "    return f", "    return 2 * f"),
         "net.py has changed: deco"),
        ("def go():\n    return 1", LEFT, "helpers.py has changed: left"),  # patches.py registers it
        ("def go():\n    return 1", REST, ""),
    ],
)  # fmt: skip
def test_every_way_of_using_something(project: Edit, code: str, edit: tuple[str, str, str], said: str) -> None:
    project("net.py", "def other", f"{code}\n\ndef other")
    before = definitions(["net.go"])
    project(*edit)
    assert difference(before, definitions(["net.go"])) == said


def test_a_method_put_on_a_class_from_outside_is_part_of_it(project: Edit) -> None:
    project("net.py", "def other(x):\n    return x\n", "def other(x):\n    return x\n\nNet.forward = other\n")
    said = change(project, "net.py", "def other(x):\n    return x", "def other(x):\n    return -x")
    assert said == "net.py has changed: other"


def test_modules_come_and_go(project: Edit) -> None:
    before, now = definitions(["net.WIDTH"]), definitions(["sub.sizes.IN"])
    assert difference(before, now).startswith("sub/sizes.py is used only now; ")
    assert difference(now, before).endswith("sub/sizes.py is used no longer")
    assert difference(before, before) == ""


def test_what_is_installed_or_no_code_adds_nothing(project: Edit) -> None:
    paths = ["torch.nn.Linear", "json.loads", "workbench.models.MLP", "prune.Pruner", "lightning.pytorch.Trainer"]
    assert definitions([*paths, "accuracy", "digits.yaml", "no.such.thing", "net.missing", "a b.c", ""]) == {}
    assert definitions_of([nn.Linear(2, 2), torch.relu, json_like(), 3, None, "net.Net"]) == {}


def json_like() -> dict[str, Any]:
    return {"a": [1, 2.0, torch.zeros(2)], "b": functools.partial(torch.optim.SGD, lr=0.1)}


def test_objects_are_known_by_their_classes_and_the_functions_they_hold(project: Edit) -> None:
    net = import_module("net")
    helpers = import_module("helpers")
    expected = definitions(["net.Net"])
    assert definitions_of([net.Net]) == definitions_of([net.Net()]) == definitions_of([{"of": [net.Net()]}]) == expected
    scale = definitions(["helpers.scale"])
    assert definitions_of([helpers.scale]) == definitions_of([functools.partial(helpers.scale, 2)]) == scale
    layer = nn.Linear(2, 2)
    layer.act = helpers.scale  # type: ignore[assignment]
    assert definitions_of([nn.Sequential(nn.ReLU(), layer)]) == scale
    assert definitions_of([net.Net().forward]) == expected


def test_a_function_inside_another_is_part_of_it() -> None:
    def inner() -> int:
        return 1

    (found,) = definitions_of([inner]).values()
    assert "test_a_function_inside_another_is_part_of_it" in found


def test_a_name_that_a_package_hands_on_late_is_found_once_it_is_imported(project: Edit, tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    (tmp_path / "late/__init__.py").write_text("def __getattr__(name):\n    import helpers\n    return helpers.scale\n")
    import_module("late")
    assert "scale" in definitions(["late.scale"])["helpers"]


def test_code_without_a_file_is_known_by_its_byte_code() -> None:
    def made(factor: int) -> Any:
        scope: dict[str, Any] = {"__name__": "in_memory"}
        code = (
            f"def used(x):\n    return {factor} * x\n\nclass Net:\n    def forward(self, x):\n        return used(x)\n"
        )
        exec(code, scope)
        return scope["Net"]

    before, same, other = (definitions_of([made(factor)]) for factor in (2, 2, 3))
    assert before == same
    assert list(before["in_memory"]) == ["Net", "used"]
    assert difference(before, other) == "in_memory.py has changed: used"
