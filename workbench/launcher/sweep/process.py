"""Processes for single runs: starting, stopping, and saying what became of them. Light, for who only does this."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench import records
from workbench.launcher.runs import LOG
from workbench.messages import printable

FAILED = 3
"""The exit code of a process whose run has failed and whose record says why."""

_COMMAND = (sys.executable, "-P", "-m", "workbench.launcher.sweep")
_TAIL = 5
# What would make a process believe that it is one of several of one training.
_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "PL_GLOBAL_SEED"),
)


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
            [*_COMMAND, str(task)],
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
    if code == FAILED and record.get("status") == "failed":
        return _last_line(record)
    try:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except ValueError:
        how = f"was killed by signal {-code}"
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2].splitlines()[1:]
    said = "".join(f"\n    {printable(line)}" for line in lines[-_TAIL:])
    return f"its process {how}; {log} ends with:{said}" if said else f"its process {how}"


def _last_line(record: Mapping[str, Any]) -> str:
    """What a failed run's error says, without its traceback."""
    lines = str(record.get("error") or "").strip().splitlines()
    return lines[-1] if lines else "its record does not say why"


def threads(shares: int) -> int:
    """Threads for each of so many processes: of those this one may have, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() else allowed) // shares)


def attempt(task: str, share: int, here: str) -> None:
    """Start a process of its own for the task and wait for it; both end together.

    Raises:
        RuntimeError: If it does not finish the run; says why.
    """
    with interruptible():
        child = start(Path(task), share, Path(here))
        try:
            code = child.wait()
        finally:
            stop(child)
    if code:
        raise RuntimeError(why(Path(task).parent, code))


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is like Ctrl-C, so that who started processes can end them."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
