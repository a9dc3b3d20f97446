"""Runs on Ray, which places them on its machines and retries them.

A Ray task is only a supervisor: it starts the run's process (`process.run_process`) and waits for it, so that a run is
the same process on Ray and off it.
"""

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
from workbench.launcher.sweep.process import run_process, sigterm_as_interrupt
from workbench.launcher.sweep.progress import ProgressDisplay
from workbench.launcher.sweep.task import RunResult, write_task
from workbench.messages import printable

_POLL = 0.5


@final
@dataclass(frozen=True)
class Ray:
    """Where Ray is and what it reserves for each run.

    Args:
        address: Address of a Ray cluster whose machines can all read and write the run's folder, such as `auto`; if
            None, Ray is started on this machine.
        cpus: CPU cores for each run.
        gpus: GPUs for each run; 0.5 puts two runs on one GPU.
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


def on_ray(
    runs: Runs, todo: Sequence[Arguments], ray: Ray, retries: int, display: ProgressDisplay
) -> Iterator[RunResult]:
    """Run ``todo`` on Ray, each until it is finished or has failed or lost its worker ``1 + retries`` times.

    A retried run resumes from what it left in its folder, on any machine.

    Raises:
        ValueError: If Ray cannot be reached or started, or this machine has less than one run needs.
    """
    import ray as core  # pyright: ignore[reportMissingImports] - an extra
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

    with _connected(ray), sigterm_as_interrupt():  # in this order: Ray installs a handler for SIGTERM when it starts
        resources: dict[str, Any] = {"num_cpus": ray.cpus, "num_gpus": ray.gpus}
        remote = core.remote(run_process).options(max_retries=retries, retry_exceptions=True, **resources)
        share = max(1, min(int(ray.cpus), int(os.environ.get("OMP_NUM_THREADS") or ray.cpus)))
        waiting = {remote.remote(str(write_task(runs, run)), share, str(Path.cwd())): run for run in todo}
        try:
            while waiting:
                ready, _ = core.wait(list(waiting), timeout=_POLL)
                display.refresh()
                for reference in ready:
                    run = waiting.pop(reference)
                    try:
                        core.get(reference)
                    except RayError as error:
                        yield RunResult(run, _error_message(error))
                    else:
                        yield RunResult(run)
        finally:
            for reference in waiting:
                core.cancel(reference, force=True)


@contextmanager
def _connected(ray: Ray) -> Iterator[None]:
    """Inside, this process is connected to Ray: as before, else to ``ray.address``, else to one on this machine."""
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
    except Exception as error:  # a cluster that cannot be reached makes it raise many types
        where = f"at {ray.address}" if ray.address else "on this machine"
        raise ValueError(f"there is no Ray {where}: {type(error).__name__}: {printable(str(error))}") from error
    try:
        resources = core.cluster_resources()
        for name, wanted in (("CPU", ray.cpus), ("GPU", ray.gpus)):
            if ray.address is None and wanted > resources.get(name, 0):
                raise ValueError(f"each run wants {wanted:g} {name}, this machine has {resources.get(name, 0):g}")
        yield
    finally:
        core.shutdown()


def _error_message(error: Any) -> str:
    """The message of the exception that failed a Ray task, without Ray's traceback around it."""
    cause = getattr(error, "cause", None)
    return str(cause) if cause is not None else f"{type(error).__name__}: {printable(str(error).partition('.')[0])}"
