"""The progress of a sweep: a line for each run that has ended, a bar for each that is running."""

from collections.abc import Sequence
from typing import final

from workbench import progress
from workbench.launcher.arguments import Arguments
from workbench.launcher.runner import score
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.task import PROGRESS, RunResult, remove_temporary_files
from workbench.messages import elapsed


@final
class ProgressDisplay:
    """Draws the runs of a sweep from their progress files, into the bars that are open when it is made.

    Args:
        runs: The sweep's runs.
        todo: Those that are not finished yet.
    """

    def __init__(self, runs: Runs, todo: Sequence[Arguments]) -> None:
        active = progress.current()
        self._bars = active if isinstance(active, progress.Bars) else None
        self._runs, self._total = runs, len(runs.plan)
        self._open = {run.stage.name: runs.folder(run) / PROGRESS for run in todo}
        self._failed = 0
        self._width = max(len(run.stage.name) for run in runs.plan)
        for path in self._open.values():
            remove_temporary_files(path.parent)
        self.refresh()

    def refresh(self) -> None:
        """Read the progress files and draw them."""
        if self._bars is None:
            return
        files = {name: progress.read_progress(path) for name, path in self._open.items()}
        running = {name: run for name, run in files.items() if run is not None}
        counts = {"running": len(running), "failed": self._failed}
        message = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        self._bars.update(self._total - len(self._open) - self._failed, self._total, message)
        self._bars.show_runs(running)

    def run_ended(self, result: RunResult) -> int:
        """Print the line of a run that has ended; returns the number of attempts that it took."""
        name = result.run.stage.name
        path = self._open.pop(name)
        attempts = progress.count_attempts(path)
        remove_temporary_files(path.parent)
        self._failed += result.failure is not None
        if self._bars is not None:
            tried = f"after {attempts} attempts" if attempts > 1 else ""
            record = self._runs.finished(result.run) or {}
            seconds = elapsed(record["seconds"]) if "seconds" in record else ""
            failure = (result.failure or "").partition("\n")[0]
            words = ("failed", tried, failure) if result.failure else (seconds, score(record), tried)
            self._bars.line(name.ljust(self._width), *words)
        self.refresh()
        return attempts
