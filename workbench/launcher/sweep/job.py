"""The ``sweep`` job: a stage repeated over a grid of its arguments."""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from workbench import records
from workbench.launcher.arguments import Arguments, checked
from workbench.launcher.runner import StageError
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.in_place import in_place
from workbench.launcher.sweep.on_ray import Ray, on_ray
from workbench.launcher.sweep.pool import in_processes
from workbench.launcher.sweep.progress import ProgressDisplay
from workbench.launcher.sweep.summary import over_seeds, row
from workbench.launcher.sweep.task import RunResult, is_distributed


def _check(workers: int, ray: object, retries: int) -> None:
    if workers < 1 or retries < 0:
        raise ValueError(f"workers is {workers} and retries {retries}: give at least 1 and 0")
    if ray is not None and workers > 1:
        raise ValueError(f"workers is {workers} beside ray, which runs as many as there is room for: give one of them")


@checked(_check)
def sweep(
    run: Runs,
    over: dict[str, list[Any]] | list[dict[str, Any]],
    workers: int = 1,
    ray: Ray | None = None,
    retries: int = 1,
    out: Path = Path("runs/sweep"),
) -> dict[str, Any]:
    """Repeat a stage over a grid of its arguments; every run is a stage in a subfolder of the sweep.

    If the sweep is called `grid`, other stages name a run as `grid/activation-relu_seed-0`. Finished runs are kept when
    the grid grows. Interrupted runs resume. A run that fails does not stop the others. With the same number of threads,
    a run gives the same result, bit for bit, in this process, in its own process, on Ray, or as a single stage.

    Args:
        run: The stage: a job and its arguments, e.g. {job: hunt, density: 0.05}. Arguments that all stages share apply,
            too.
        over: Values by dotted key, of which all combinations are run, e.g. {model.init_args.activation: [relu, gelu],
            seed: [0, 1, 2]}; or a list of settings, e.g. [{density: 0.1, rate: 0.2}, {density: 0.05}].
        workers: How many runs go on at a time. With 1, one after the other in this process; with more, each in its own
            process.
        ray: Run on Ray instead: {} on this machine, or e.g. {address: auto, cpus: 2, gpus: 0.5} on a cluster, with
            these resources for each run.
        retries: How often a run that failed or died is retried.
        out: The stage's folder, given by the recipe.

    Returns:
        `runs`, a row for each, and `summary`, means over seeds, for the record.

    Raises:
        StageError: If runs failed, when all others are finished; which and why. The same command tries those again.
        ValueError: If workers or retries are out of range, or Ray is not installed or cannot be reached.
    """
    _check(workers, ray, retries)
    todo = [each for each in run.plan if run.finished(each) is None]
    display = ProgressDisplay(run, todo)
    attempts: dict[str, int] = {}
    failures: dict[str, str] = {}
    # Closing the generator also when this loop is interrupted stops the processes that it started.
    with closing(_execute(run, todo, workers, ray, retries, display)) as results:
        for result in results:
            name = result.run.stage.name
            attempts[name] = display.run_ended(result)
            if result.failure is not None:
                failures[name] = result.failure
    rows = [
        row(
            name.rpartition("/")[2],
            over=each.stage.over,
            fingerprint=run.lineage[name][0],
            record=None if name in failures else run.finished(each),
            attempts=attempts.get(name, 0),
            failure=failures.get(name),
        )
        for each in run.plan
        for name in [each.stage.name]
    ]
    record = records.encode(records.SweepResult(rows, over_seeds(rows)))
    if failures:
        head = f"{len(failures)} of {len(rows)} runs failed, the others are kept"
        lines = [f"  {name}: {failure}" for name, failure in failures.items()]
        raise StageError("\n".join([head, *lines]), record)
    return record


def _execute(
    runs: Runs, todo: Sequence[Arguments], workers: int, ray: Ray | None, retries: int, display: ProgressDisplay
) -> Generator[RunResult]:
    """Run the sweep in this process or in workers; yields each run's result as it ends."""
    if ray is not None:
        yield from on_ray(runs, todo, ray, retries, display)
    elif workers > 1 or is_distributed() or any(_uses_several_devices(runs, each) for each in todo):
        yield from in_processes(runs, todo, workers, retries, display)
    else:
        yield from in_place(runs, todo, retries, display)


def _uses_several_devices(runs: Runs, run: Arguments) -> bool:
    """Whether a run trains on several devices.

    Lightning then starts this process's command again for each other device. Only a run in its own process has a
    command that starts the run and not the whole recipe.
    """
    if not run.trains:
        return False
    trainer: dict[str, Any] = {}
    for _, source in run.sources():  # a run that starts from a stage inherits its trainer
        parent = records.read(runs.out / source) or {}
        trainer |= (parent.get("arguments") or {}).get("trainer") or {}
    trainer |= {name: value for name, value in run.resolved()["trainer"].items() if value is not None}
    if (trainer.get("num_nodes") or 1) > 1:
        return True
    devices = trainer.get("devices") or "auto"
    if devices == "auto":
        return trainer.get("accelerator") != "cpu" and torch.cuda.device_count() > 1
    return devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1)
