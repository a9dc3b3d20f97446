"""At most one process works in a folder.

The lock is the operating system's, `flock` on ``<folder>/.lock``: it ends with the process that holds it, however that
dies, so there is no stale lock to judge by its age. A forked child, as a loader's worker, shares its parent's lock and
would keep it beyond the parent's death; it lets go of it as soon as it is born.
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

    Inside itself, in the same process, it does nothing. Of the ranks of one training only rank zero locks.

    Raises:
        ValueError: At once, if another process works there, with its number, host and start; or if the folder cannot
            be written to.
    """
    place = folder.resolve()
    if rank() != 0 or place in _held or fcntl is None:
        yield
        return
    path = place / ".lock"
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle = _taken(path, folder)
    except OSError as error:
        why = f"{folder}: cannot be locked: {error.strerror}"
        raise ValueError(f"{why}; make it a folder that can be written to, or choose another") from error
    _held[place] = handle
    try:
        yield
    finally:
        if _held.get(place) == handle:  # else this is a forked child, which holds nothing
            del _held[place]
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def _taken(path: Path, folder: Path) -> int:
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
            os.close(handle)  # its holder was about to remove it: there is, or will be, another
        except BlockingIOError:
            text = os.pread(handle, 4096, 0)
            os.close(handle)
            raise ValueError(_said(folder, text)) from None
        except OSError:
            os.close(handle)
            raise


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _said(folder: Path, text: bytes) -> str:
    """Who works in the folder, and what to do about it."""
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


def _let_go() -> None:
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
