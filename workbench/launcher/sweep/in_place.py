"""Runs one after the other, in this process."""

from collections.abc import Iterator, Sequence

from workbench.launcher.arguments import Arguments
from workbench.launcher.runner import StageError
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.progress import Watch
from workbench.launcher.sweep.task import Done, perform


def in_place(runs: Runs, todo: Sequence[Arguments], retries: int, watch: Watch) -> Iterator[Done]:
    """Perform the runs here, each until it is finished or has failed ``1 + retries`` times."""
    for run in todo:
        failure = None
        for _ in range(1 + retries):
            try:
                perform(run, runs.out, runs.lineage, watch.look)
            except (StageError, ValueError) as error:
                failure = str(error).partition("\n")[0].removeprefix(f"stage '{run.stage.name}': ")
            else:
                failure = None
                break
        yield Done(run, failure)
