"""One run of a sweep, wherever it is performed: in this process, in one of its own, on another machine."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from workbench import progress
from workbench.distributed.ranks import world_size
from workbench.files import write_json
from workbench.launcher.arguments import Arguments
from workbench.launcher.jobs import find_jobs
from workbench.launcher.recipe import Recipe, Stage
from workbench.launcher.runner import run_stage
from workbench.launcher.runs import Runs
from workbench.records.lock import locked

PROGRESS = ".progress.json"
_TASK = ".task.json"


@final
@dataclass(frozen=True)
class Done:
    """A run is over: it is finished, or every attempt at it failed.

    Args:
        run: Which.
        failure: Why it is not finished.
    """

    run: Arguments
    failure: str | None = None


def perform(
    run: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]], look: Callable[[], None] = lambda: None
) -> None:
    """Run it here and now; nobody else does at the same time.

    Args:
        run: The run's arguments.
        out: The folder of the recipe's run.
        lineage: Of the run and the stages above it, fingerprint and parents.
        look: Called now and then.

    Raises:
        StageError: If it fails.
        ValueError: If another process works on it.
    """
    folder = out / run.stage.name
    with locked(folder), progress.progress_file(folder / PROGRESS, look):
        run_stage(run, out, lineage)


def write_task(runs: Runs, run: Arguments) -> Path:
    """Write what a process of its own needs to know of the run into its folder; the file."""
    path = runs.folder(run).resolve() / _TASK
    stage = run.stage
    known = {name: entry for name, entry in runs.lineage.items() if name == stage.name or name not in _names(runs)}
    task = {"stage": stage.name, "job": stage.job.name, "arguments": stage.arguments, "lineage": known}
    write_json(path, {**task, "out": str(runs.out.resolve())})
    return path


def perform_task(path: Path) -> None:
    """Perform what :func:`write_task` wrote."""
    task = json.loads(path.read_text(encoding="utf-8"))
    stage = Stage(task["stage"], find_jobs()[task["job"]], task["arguments"])
    perform(Arguments(Recipe(path, ()), stage), Path(task["out"]), task["lineage"])


def tidy(folder: Path) -> None:
    """Remove what was only there while the run in ``folder`` was performed."""
    for name in (PROGRESS, _TASK):
        (folder / name).unlink(missing_ok=True)


def launched() -> bool:
    """Whether this process is one of several that a launcher started for one training, or has a process group."""
    return world_size() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"))


def _names(runs: Runs) -> set[str]:
    return {run.stage.name for run in runs.plan}
