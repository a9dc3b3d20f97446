"""Runs in processes of their own, a few at a time: one that dies takes no other with it."""

import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from workbench.launcher.arguments import Arguments
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.process import interruptible, start, stop, threads, why
from workbench.launcher.sweep.progress import Watch
from workbench.launcher.sweep.task import Done, write_task

_POLL = 0.2


def in_processes(runs: Runs, todo: Sequence[Arguments], workers: int, retries: int, watch: Watch) -> Iterator[Done]:
    """Perform the runs, ``workers`` at a time, each until it is finished or has failed ``1 + retries`` times.

    When this is stopped, by Ctrl-C or SIGTERM, so are they.
    """
    waiting, failed = deque(todo), Counter[str]()
    busy: dict[subprocess.Popen[bytes], Arguments] = {}
    with interruptible():
        try:
            while waiting or busy:
                while waiting and len(busy) < workers:
                    run = waiting.popleft()
                    busy[start(write_task(runs, run), threads(workers))] = run
                time.sleep(_POLL)
                watch.look()
                for child in [child for child in busy if child.poll() is not None]:
                    run = busy.pop(child)
                    stop(child)
                    failed[run.stage.name] += 1
                    if runs.finished(run):
                        yield Done(run)
                    elif failed[run.stage.name] <= retries:
                        waiting.append(run)
                    else:
                        yield Done(run, why(runs.folder(run), child.returncode))
        finally:
            for child in busy:
                child.terminate()
            for child in busy:
                stop(child)
