"""``python -m workbench.launcher.sweep TASK``: one run of a sweep, in a process of its own."""

import os
import signal
import sys
import threading
from pathlib import Path


def main(task: Path) -> None:
    """Perform the task. Exits with 3 if it fails, as its record says, with 2 if it cannot be begun."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from workbench.launcher.runner import StageError
    from workbench.launcher.sweep.process import FAILED
    from workbench.launcher.sweep.task import perform_task

    try:
        perform_task(task)
    except StageError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(FAILED)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _end_with_parent() -> None:
    """Wait until the process that holds the other end of standard input is gone, then end all that this one started."""
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getsid(0):  # a session that was begun for this task
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
