"""Runs on Ray, which places them, tries them again and knows the machines."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

from workbench.launcher.arguments import Arguments
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.process import attempt, interruptible
from workbench.launcher.sweep.progress import Watch
from workbench.launcher.sweep.task import Done, write_task
from workbench.messages import printable

_POLL = 0.5


@final
@dataclass(frozen=True)
class Ray:
    """Where Ray is and what it sets aside for each run.

    Args:
        address: A cluster's, whose machines see the run's folder; one is started on this machine if not given.
        cpus: Processors for each run.
        gpus: GPUs for each run, 0.5 for two runs on one.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0")
        if find_spec("ray") is None:
            raise ValueError("ray is not installed: pip install 'distill-prune[ray]', or give workers")


def on_ray(runs: Runs, todo: Sequence[Arguments], ray: Ray, retries: int, watch: Watch) -> Iterator[Done]:
    """Perform the runs on Ray, each until it is finished or has failed or lost its worker ``1 + retries`` times.

    A run that is tried again goes on from what it left in its folder, on whichever machine.

    Raises:
        ValueError: If Ray cannot be reached or started, or this machine has less than one run needs.
    """
    import ray as core  # pyright: ignore[reportMissingImports] - an extra
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

    with _running(ray), interruptible():  # in this order: Ray has a handler of its own
        resources: dict[str, Any] = {"num_cpus": ray.cpus, "num_gpus": ray.gpus}
        remote = core.remote(attempt).options(max_retries=retries, retry_exceptions=True, **resources)
        share = max(1, min(int(ray.cpus), int(os.environ.get("OMP_NUM_THREADS") or ray.cpus)))
        waiting = {remote.remote(str(write_task(runs, run)), share, str(Path.cwd())): run for run in todo}
        try:
            while waiting:
                ready, _ = core.wait(list(waiting), timeout=_POLL)
                watch.look()
                for reference in ready:
                    run = waiting.pop(reference)
                    try:
                        core.get(reference)
                    except RayError as error:
                        yield Done(run, _said(error))
                    else:
                        yield Done(run)
        finally:
            for reference in waiting:
                core.cancel(reference, force=True)


@contextmanager
def _running(ray: Ray) -> Iterator[None]:
    """Inside, this process is connected to Ray: to the cluster asked for, to one it is connected to, or to its own."""
    import ray as core  # pyright: ignore[reportMissingImports] - an extra

    if core.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray.address is None:
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        quiet |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "runtime_env": environment}
    try:
        core.init(address=ray.address or "local", **quiet)
    except Exception as error:  # whatever a cluster that is not there makes it raise
        where = f"at {ray.address}" if ray.address else "on this machine"
        raise ValueError(f"there is no Ray {where}: {type(error).__name__}: {printable(str(error))}") from error
    try:
        have = core.cluster_resources()
        for name, wanted in (("CPU", ray.cpus), ("GPU", ray.gpus)):
            if ray.address is None and wanted > have.get(name, 0):
                raise ValueError(f"each run wants {wanted:g} {name}, this machine has {have.get(name, 0):g}")
        yield
    finally:
        core.shutdown()


def _said(error: Any) -> str:
    """What a failed task of Ray says, without Ray's own account of it."""
    cause = getattr(error, "cause", None)
    return str(cause) if cause is not None else f"{type(error).__name__}: {printable(str(error).partition('.')[0])}"
