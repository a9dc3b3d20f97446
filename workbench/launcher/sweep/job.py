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
from workbench.launcher.sweep.progress import Watch
from workbench.launcher.sweep.summary import over_seeds, row
from workbench.launcher.sweep.task import Done, launched


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
    """Repeat a stage over a grid of its arguments; every run is a stage of its own, in a folder of this one's.

    Another stage names a run as `grid/activation-relu_seed-0`. What is finished is kept, also when the grid grows; what
    was stopped goes on. A run that fails does not stop the others. A run comes to the same, bit for bit, in place, in
    processes, on Ray, or as a stage by itself, if the number of threads is the same.

    Args:
        run: The stage: a job and its arguments, e.g. {job: hunt, density: 0.05}, with those that stages share.
        over: Values by dotted key, e.g. {model.init_args.activation: [relu, gelu], seed: [0, 1, 2]}, all combined; or a
            list of settings, e.g. [{density: 0.1, rate: 0.2}, {density: 0.05}].
        workers: Runs at a time. 1: one after the other in this process; more: each in a process of its own.
        ray: Instead, let Ray place them: {} on this machine, or {address: auto, cpus: 2, gpus: 0.5}, for each run.
        retries: How often a run that failed or died is tried again.
        out: The stage's folder, given by the recipe.

    Returns:
        `runs`, a row for each, and `summary`, means over seeds, for the record.

    Raises:
        StageError: If runs failed, when all others are finished; which and why. The same command tries those again.
        ValueError: If workers or retries are out of range, or Ray is not there.
    """
    _check(workers, ray, retries)
    before = {each.stage.name: run.finished(each) for each in run.plan}
    todo = [each for each in run.plan if before[each.stage.name] is None]
    watch = Watch(run, todo)
    attempts: dict[str, int] = {}
    failures: dict[str, str] = {}
    with closing(_performed(run, todo, workers, ray, retries, watch)) as ended:
        for done in ended:
            name = done.run.stage.name
            attempts[name] = watch.ended(done)
            if done.failure is not None:
                failures[name] = done.failure
    rows = [
        row(
            name.rpartition("/")[2],
            each.stage.over,
            run.lineage[name][0],
            None if name in failures else run.finished(each),
            attempts.get(name, 0),
            failures.get(name),
        )
        for each in run.plan
        for name in [each.stage.name]
    ]
    found = {"runs": rows, "summary": over_seeds(rows)}
    if failures:
        told = [f"  {name}: {failure}" for name, failure in failures.items()]
        raise StageError("\n".join([f"{len(failures)} of {len(rows)} runs failed, the others are kept", *told]), found)
    return found


def _performed(
    runs: Runs, todo: Sequence[Arguments], workers: int, ray: Ray | None, retries: int, watch: Watch
) -> Generator[Done]:
    """The runs as they end, wherever they are performed."""
    if ray is not None:
        yield from on_ray(runs, todo, ray, retries, watch)
    elif workers > 1 or launched() or any(_of_several_devices(runs, each) for each in todo):
        yield from in_processes(runs, todo, workers, retries, watch)
    else:
        yield from in_place(runs, todo, retries, watch)


def _of_several_devices(runs: Runs, run: Arguments) -> bool:
    """Whether Lightning may start the run's command again for its other devices: that has to be the run's own."""
    if not run.trains:
        return False
    trainer: dict[str, Any] = {}
    for _, source in run.sources():  # a run that starts from a stage has what it is not given from there
        above = records.read(runs.out / source) or {}
        trainer |= (above.get("arguments") or {}).get("trainer") or {}
    trainer |= {name: value for name, value in run.resolved()["trainer"].items() if value is not None}
    if (trainer.get("num_nodes") or 1) > 1:
        return True
    devices = trainer.get("devices") or "auto"
    if devices == "auto":
        return trainer.get("accelerator") != "cpu" and torch.cuda.device_count() > 1
    return devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1)
