"""One run of a sweep: in this process (`execute`), or described by a task file that another process executes.

The task file, ``<out>/<sweep>/<run>/.task.json``, holds the run's stage, job, arguments and lineage, and the folder of
the recipe's run. It exists only while the run is in progress, as does the progress file beside it.
"""

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
class RunResult:
    """How a run ended.

    Args:
        run: The run.
        failure: Why the last attempt failed; None if the run is finished.
    """

    run: Arguments
    failure: str | None = None


def execute(
    run: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]], on_update: Callable[[], None] = lambda: None
) -> None:
    """Run it in this process, under the lock of its folder.

    Args:
        run: The run's arguments.
        out: The folder of the recipe's run.
        lineage: Fingerprint and parents of the run and of the stages above it.
        on_update: Called when progress is written, at most every half second.

    Raises:
        StageError: If it fails.
        ValueError: If another process works on it.
    """
    folder = out / run.stage.name
    with locked(folder), progress.progress_file(folder / PROGRESS, on_update):
        run_stage(run, out, lineage)


def write_task(runs: Runs, run: Arguments) -> Path:
    """Write the run's task file into its folder; returns the file."""
    path = runs.folder(run).resolve() / _TASK
    stage = run.stage
    # Without the other runs, which it cannot name: in a large grid they would be most of the file.
    others = {other.stage.name for other in runs.plan} - {stage.name}
    lineage = {name: entry for name, entry in runs.lineage.items() if name not in others}
    task = {"stage": stage.name, "job": stage.job.name, "arguments": stage.arguments, "lineage": lineage}
    write_json(path, {**task, "out": str(runs.out.resolve())})
    return path


def execute_task(path: Path) -> None:
    """Run what the task file ``path`` describes."""
    task = json.loads(path.read_text(encoding="utf-8"))
    stage = Stage(task["stage"], find_jobs()[task["job"]], task["arguments"])
    execute(Arguments(Recipe(path, ()), stage), Path(task["out"]), task["lineage"])


def remove_temporary_files(folder: Path) -> None:
    """Remove the task file and the progress file of the run in ``folder``."""
    for name in (PROGRESS, _TASK):
        (folder / name).unlink(missing_ok=True)


def is_distributed() -> bool:
    """Whether this process is a rank of a distributed training, e.g. started by torchrun."""
    return world_size() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"))
