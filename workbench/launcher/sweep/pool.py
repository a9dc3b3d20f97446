"""A pool of worker processes, one per run, a few at a time: a run that dies takes no other with it.

The sweep is the driver. It writes a task file, starts a process for it (`process.start`) and polls until that ends; a
run that failed or was killed goes to the end of the queue until its retries are used up.
"""

import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from workbench.launcher.arguments import Arguments
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.process import failure_reason, sigterm_as_interrupt, start, stop, threads
from workbench.launcher.sweep.progress import ProgressDisplay
from workbench.launcher.sweep.task import RunResult, write_task

_POLL = 0.2


def in_processes(
    runs: Runs, todo: Sequence[Arguments], workers: int, retries: int, display: ProgressDisplay
) -> Iterator[RunResult]:
    """Run ``todo``, ``workers`` at a time, each until it is finished or has failed ``1 + retries`` times.

    Ctrl-C or SIGTERM stops the processes too.
    """
    waiting, failed = deque(todo), Counter[str]()
    busy: dict[subprocess.Popen[bytes], Arguments] = {}
    with sigterm_as_interrupt():
        try:
            while waiting or busy:
                while waiting and len(busy) < workers:
                    run = waiting.popleft()
                    busy[start(write_task(runs, run), threads(workers))] = run
                time.sleep(_POLL)
                display.refresh()
                for child in [child for child in busy if child.poll() is not None]:
                    run = busy.pop(child)
                    stop(child)  # the process has ended; its own children may not have
                    failed[run.stage.name] += 1
                    if runs.finished(run):
                        yield RunResult(run)
                    elif failed[run.stage.name] <= retries:
                        waiting.append(run)
                    else:
                        yield RunResult(run, failure_reason(runs.folder(run), child.returncode))
        finally:
            for child in busy:
                child.terminate()  # all at once, so that they end at the same time, and not one after the other
            for child in busy:
                stop(child)
