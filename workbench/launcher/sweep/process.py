"""A process for one run: starting it, stopping it, and the reason why it failed. Imports no torch.

Who kills whom: a run's process leads its own session, so that `stop` can kill it with all that it started, loader
workers too. Its standard input is a pipe whose other end the driver holds; when the driver dies, even by SIGKILL, the
pipe closes, and the process kills its own session (`sweep.__main__`). So no run outlives its sweep.
"""

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
"""Exit code of a process whose run failed and whose record has the error."""

_COMMAND = (sys.executable, "-P", "-m", "workbench.launcher.sweep")
_TAIL = 5
# Environment variables by which a process would take itself for one rank of a distributed training.
_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "PL_GLOBAL_SEED"),
)


def start(task: Path, threads: int, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a process for the task; it and its children end with this one, even if this one is killed.

    Its output is appended to ``log.txt`` beside the task.

    Args:
        task: The task file that :func:`write_task` wrote.
        threads: Number of threads that it may compute with.
        cwd: Its working folder, for relative paths; this process's if not given.
    """
    launcher = {name for name in os.environ if name in _LAUNCHER or name.startswith("TORCHELASTIC_")}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
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
            cwd=cwd,
            start_new_session=True,
        )


def stop(child: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """Terminate the process, wait up to ``patience`` seconds, then kill it and everything that it started."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()


def failure_reason(folder: Path, code: int) -> str:
    """Why a process did not finish the run in ``folder``: the recorded error, else its exit code and end of its log."""
    record = records.read(folder) or {}
    if code == FAILED and record.get("status") == "failed":
        return _error_message(record)
    try:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except ValueError:
        how = f"was killed by signal {-code}"
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2].splitlines()[1:]
    tail = "".join(f"\n    {printable(line)}" for line in lines[-_TAIL:])
    return f"its process {how}; {log} ends with:{tail}" if tail else f"its process {how}"


def _error_message(record: Mapping[str, Any]) -> str:
    """The message of a failed run's error: the last line of its traceback."""
    lines = str(record.get("error") or "").strip().splitlines()
    return lines[-1] if lines else "its record gives no reason"


def threads(shares: int) -> int:
    """Number of threads for each of ``shares`` processes, at least one, out of those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(limit) if limit.isdecimal() else allowed) // shares)


def run_process(task: str, threads: int, cwd: str) -> None:
    """Start a process for the task and wait for it; if this one is stopped, so is that.

    Raises:
        RuntimeError: If it does not finish the run; with the reason.
    """
    with sigterm_as_interrupt():
        child = start(Path(task), threads, Path(cwd))
        try:
            code = child.wait()
        finally:
            stop(child)
    if code:
        raise RuntimeError(failure_reason(Path(task).parent, code))


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that ``finally`` can stop the processes started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
