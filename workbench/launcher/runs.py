"""The runs of a sweep, as the sweep job receives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from workbench import records
from workbench.launcher.arguments import Arguments


@final
@dataclass(frozen=True)
class Runs:
    """The stage under a sweep's ``run``, once for each point of its grid, checked.

    Args:
        plan: The checked arguments of each run.
        out: The folder of the recipe's run; a run of the sweep is in ``<out>/<sweep>/<run>``.
        lineage: Fingerprint and parents of every run and of every stage above the sweep.
    """

    plan: tuple[Arguments, ...]
    out: Path
    lineage: Mapping[str, tuple[str, Any]]

    def folder(self, run: Arguments) -> Path:
        """The run's folder."""
        return self.out / run.stage.name

    def finished(self, run: Arguments) -> dict[str, Any] | None:
        """The run's record if it is finished, with these arguments and parents."""
        record = records.finished(self.folder(run))
        return record if record and record.get("fingerprint") == self.lineage[run.stage.name][0] else None


LOG = "log.txt"
"""The file in a run's folder with the output of the run's process."""
