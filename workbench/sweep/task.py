"""One run of a sweep, wherever it is performed: in this process, in one of its own, on another machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from workbench import progress, records
from workbench.arguments import Arguments
from workbench.files import write_json
from workbench.jobs import find_jobs
from workbench.locking import locked
from workbench.ranks import world
from workbench.recipe import Recipe, Stage
from workbench.run import LOG, run_stage
from workbench.sweep.runs import Runs

PROGRESS = ".progress.json"
_TASK = ".task.json"
_TAIL = 5
# What would make a process believe that it is one of several of one training.
_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "PL_GLOBAL_SEED"),
)


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
    with locked(folder), progress.telling(folder / PROGRESS, look):
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


def start(task: Path, threads: int, here: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a process of its own for the task; it and its children end with this one, however that ends.

    What it says goes to ``log.txt`` beside the task.

    Args:
        task: What :func:`write_task` wrote.
        threads: That it may compute with.
        here: The folder that relative paths are meant from, if not this process's.
    """
    ours = {name for name in os.environ if name in _LAUNCHER or name.startswith("TORCHELASTIC_")}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (task.parent / LOG).open("ab") as log:
        log.write(f"--- {records.now()}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "workbench.sweep", str(task)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=here,
            start_new_session=True,
        )


def stop(child: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """Ask the process to stop, wait as long as is patient, in seconds, then end it and all that it started."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()


def why(folder: Path, code: int) -> str:
    """Why a process of its own did not finish the run in ``folder``: what it recorded, else how it ended and said."""
    record = records.read(folder) or {}
    if code == 1 and record.get("status") == "failed":
        return last_line(record)
    try:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except ValueError:
        how = f"was killed by signal {-code}"
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2].splitlines()[1:]
    said = "".join(f"\n    {progress.printable(line)}" for line in lines[-_TAIL:])
    return f"its process {how}; {log} ends with:{said}" if said else f"its process {how}"


def last_line(record: Mapping[str, Any]) -> str:
    """What a failed run's error says, without its traceback."""
    lines = str(record.get("error") or "").strip().splitlines()
    return lines[-1] if lines else "its record does not say why"


def launched() -> bool:
    """Whether this process is one of several that a launcher started for one training, or has a process group."""
    return world() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"))


def threads(shares: int) -> int:
    """Threads for each of so many processes: of those this one may have, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() else allowed) // shares)


def _names(runs: Runs) -> set[str]:
    return {run.stage.name for run in runs.plan}
