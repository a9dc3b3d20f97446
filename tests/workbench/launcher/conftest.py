"""A package whose job takes dataclasses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.distributions import write_metadata

JOB = '''
from pathlib import Path
from workbench.duration import Duration
from package_of_pruning import Mode, Rewind, Steps

def prune(
    levels: int | Steps | None = None,
    rewind: Duration | Rewind = Duration(1, "ep"),
    exact: Steps = Steps(),
    terms: dict[str, Steps] | None = None,
    modes: list[Mode] | Rewind | None = None,
    out: Path = Path(),
) -> dict:
    """Prune.

    Args:
        levels: How far.
        rewind: Where each level starts.
    """
    return {"built": repr((levels, rewind, exact, terms, modes))}
'''
INIT = """
from typing import TYPE_CHECKING
from package_of_pruning.rewinding import Mode, Rewind
if TYPE_CHECKING:
    from package_of_pruning.steps import Steps as Steps
def __getattr__(name):
    from package_of_pruning import steps
    return getattr(steps, name)
"""
STEPS = '''
import dataclasses
from typing import ClassVar

@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps.

    Args:
        count: How many, see :func:`a.b` and
            ``c``.
        rate: Share of each.
    """

    known: ClassVar[int] = 0
    count: int | None = None
    rate: float = 0.2
    names: list[str] = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}: give a share in (0, 1)")
'''
REWINDING = '''
from dataclasses import dataclass
from typing import Literal
from package_of_pruning.steps import Steps
from workbench.duration import Duration

Mode = Literal["all", "weights"]

@dataclass(frozen=True)
class Rewind:
    """Rewind.

    Args:
        at: When.
        mode: What.
    """

    at: Duration
    mode: Mode = "all"
    inner: Steps | None = None
'''


@pytest.fixture
def pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the package, which offers the job `prune_in_steps`."""
    folder = tmp_path / "site"
    (folder / "package_of_pruning").mkdir(parents=True)
    for name, text in {"__init__": INIT, "job": JOB, "steps": STEPS, "rewinding": REWINDING}.items():
        (folder / "package_of_pruning" / f"{name}.py").write_text(text)
    write_metadata(folder, "package_of_pruning", "[workbench.jobs]\nprune_in_steps = package_of_pruning.job:prune\n")
    monkeypatch.syspath_prepend(folder)
    yield folder / "package_of_pruning"
    for name in [name for name in sys.modules if name.partition(".")[0] == "package_of_pruning"]:
        del sys.modules[name]
