"""The runs of a sweep, as its job is given them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from workbench import records
from workbench.launcher.arguments import Arguments


@final
@dataclass(frozen=True)
class Runs:
    """The stage that stands under a sweep's ``run``, once for every point of its grid, checked.

    Args:
        plan: The runs.
        out: The folder of the recipe's run; a run of the sweep is in ``<out>/<sweep>/<run>``.
        lineage: Of every stage above and of every run, the fingerprint and the parents.
    """

    plan: tuple[Arguments, ...]
    out: Path
    lineage: Mapping[str, tuple[str, Any]]

    def folder(self, run: Arguments) -> Path:
        """Where the run is."""
        return self.out / run.stage.name

    def finished(self, run: Arguments) -> dict[str, Any] | None:
        """The run's record if it is finished, with these arguments and parents."""
        record = records.finished(self.folder(run))
        return record if record and record.get("fingerprint") == self.lineage[run.stage.name][0] else None


LOG = "log.txt"
"""What a run in a process of its own says, in its folder."""
