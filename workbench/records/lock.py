"""A lock on a folder: at most one process works in it.

The lock is the operating system's, `flock` on ``<folder>/.lock``. It is released when its process ends, even by
SIGKILL, so there are no stale locks. A forked child, such as a loader's worker, shares its parent's lock and would hold
it after the parent's death; so a child closes it right after the fork.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workbench.distributed.ranks import rank
from workbench.records.record import now

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

_held: dict[Path, int] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process works in ``folder``, which is made if it is not there.

    Reentrant: a second lock of the same folder by the same process does nothing. Only rank zero of a training locks.

    Raises:
        ValueError: At once, if another process works there, with its number, host and start; or if the folder cannot
            be written to.
    """
    resolved = folder.resolve()
    if rank() != 0 or resolved in _held or fcntl is None:
        yield
        return
    path = resolved / ".lock"
    try:
        resolved.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, folder)
    except OSError as error:
        problem = f"{folder}: cannot be locked: {error.strerror}"
        raise ValueError(f"{problem}; make it a folder that can be written to, or choose another") from error
    _held[resolved] = handle
    try:
        yield
    finally:
        if _held.get(resolved) == handle:  # else this is a forked child, which released it
            del _held[resolved]
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def _acquire(path: Path, folder: Path) -> int:
    """The open, locked file at ``path``.

    Raises:
        ValueError: If another process holds it.
    """
    assert fcntl is not None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(owner).encode(), 0)
                return handle
            os.close(handle)  # the holder removed the file between open and flock: lock the new one
        except BlockingIOError:
            text = os.pread(handle, 4096, 0)
            os.close(handle)
            raise ValueError(_in_use(folder, text)) from None
        except OSError:
            os.close(handle)
            raise


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, text: bytes) -> str:
    """The message that names the process that holds the lock, and what to do."""
    try:
        owner = json.loads(text)
        pid, host, since = owner["pid"], owner["host"], owner["since"]
    except (ValueError, KeyError, TypeError):
        return f"{folder} is in use by another process: wait until it is done, or choose another folder"
    stop = f"stop it (kill {pid})" if host == socket.gethostname() else f"stop it there (kill {pid} on {host})"
    return (
        f"{folder} is in use by process {pid} on {host} since {since}: wait until it is done, {stop}, "
        "or choose another folder"
    )


def _release_in_child() -> None:
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
