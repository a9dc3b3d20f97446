"""How far a sweep and its runs are: a line for each that is over, a bar for each at work, read from what they tell."""

from collections.abc import Sequence
from typing import final

from workbench import progress
from workbench.launcher.arguments import Arguments
from workbench.launcher.runner import score
from workbench.launcher.runs import Runs
from workbench.launcher.sweep.task import PROGRESS, Done, tidy


@final
class Watch:
    """Draws into the bars that are open when it is made.

    Args:
        runs: Of the sweep.
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
            tidy(path.parent)
        self.look()

    def look(self) -> None:
        """Draw what the runs have told by now."""
        if self._bars is None:
            return
        told = {name: told for name, path in self._open.items() if (told := progress.read_progress(path)) is not None}
        counts = {"running": len(told), "failed": self._failed}
        message = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        self._bars.update(self._total - len(self._open) - self._failed, self._total, message)
        self._bars.show_runs(told)

    def ended(self, done: Done) -> int:
        """Say how the run ended; the number of attempts that it took."""
        name = done.run.stage.name
        path = self._open.pop(name)
        attempts = progress.count_attempts(path)
        tidy(path.parent)
        self._failed += done.failure is not None
        if self._bars is not None:
            tried = f"after {attempts} attempts" if attempts > 1 else ""
            record = self._runs.finished(done.run) or {}
            seconds = progress.elapsed(record["seconds"]) if "seconds" in record else ""
            failure = (done.failure or "").partition("\n")[0]
            said = ("failed", tried, failure) if done.failure else (seconds, score(record), tried)
            self._bars.line(name.ljust(self._width), *said)
        self.look()
        return attempts
