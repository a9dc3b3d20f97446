"""Runs one after the other, in this process."""

from collections.abc import Iterator, Sequence

from workbench.launcher.arguments import Arguments
from workbench.launcher.runner import StageError
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.progress import ProgressDisplay
from workbench.launcher.sweep.task import RunResult, execute


def in_place(runs: Runs, todo: Sequence[Arguments], retries: int, display: ProgressDisplay) -> Iterator[RunResult]:
    """Run ``todo`` in this process, each until it is finished or has failed ``1 + retries`` times."""
    for run in todo:
        failure = None
        for _ in range(1 + retries):
            try:
                execute(run, runs.out, runs.lineage, display.refresh)
            except (StageError, ValueError) as error:
                failure = str(error).partition("\n")[0].removeprefix(f"stage '{run.stage.name}': ")
            else:
                failure = None
                break
        yield RunResult(run, failure)
