"""``python -m workbench.launcher.sweep TASK``: one run of a sweep, in its own process."""

import os
import signal
import sys
import threading
from pathlib import Path


def main(task: Path) -> None:
    """Execute the task file. Exits with 3 if the run failed and its record has the error, with 2 if it cannot start."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from workbench.launcher.runner import StageError
    from workbench.launcher.sweep.process import FAILED
    from workbench.launcher.sweep.task import execute_task

    try:
        execute_task(task)
    except StageError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(FAILED)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _end_with_parent() -> None:
    """Wait until the driver, which holds the other end of standard input, is gone; then kill this whole session."""
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getsid(0):  # else a user started this, and the session is the terminal
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
