"""Forked processes: as separate as those of a new interpreter, without the seconds that it takes to import."""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from workbench.records.lock import locked

FORK = multiprocessing.get_context("fork")
CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")


def forked(action: Callable[..., Any], *args: Any, output: Path | str = os.devnull) -> BaseProcess:
    """Start ``action(*args)`` in a child process that writes to ``output`` and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        process = FORK.Process(target=_child, args=(action, args, output))
        process.start()
    return process


def run_until_killed(action: Callable[[], Any], folder: Path, when: Callable[[], bool]) -> None:
    """Run ``action`` in a child process that gets SIGKILL at its first change to ``folder`` at which ``when()`` holds.

    The child checks before each change to the file system, so that the moment does not depend on the machine's load.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and _changes(event, args) and str(args[0]).startswith(str(folder)) and when():
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        sys.addaudithook(hook)
        action()

    process = forked(killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"


@contextmanager
def holder(folder: Path, child: bool = False) -> Iterator[tuple[BaseProcess, list[int]]]:
    """Another process that works in the folder, and its children."""
    ours, theirs = FORK.Pipe()
    process = forked(_hold, folder, child, theirs)
    children = ours.recv()
    try:
        yield process, children
    finally:
        process.kill()
        process.join()
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _hold(folder: Path, child: bool, pipe: Connection) -> None:
    """Work in the folder until killed; send the number of a forked child, which is past its birth, if there is one."""
    with locked(folder):
        children = []
        if child:
            ours, theirs = FORK.Pipe()
            FORK.Process(target=_live, args=(theirs,)).start()
            children.append(ours.recv())
        pipe.send(children)
        pipe.recv()


def _live(pipe: Connection) -> None:
    pipe.send(os.getpid())
    time.sleep(600)


def _changes(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event changes files: of "open", only for writing."""
    return event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _child(action: Callable[..., Any], args: tuple[Any, ...], output: Path | str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    # not the streams that pytest replaced to capture them
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    action(*args)
