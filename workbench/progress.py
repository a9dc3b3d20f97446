"""Two progress bars for a recipe: the whole of it above, the stage at work below.

The runner opens `bars` and wraps each stage in `Bars.stage`; a training loop or a job calls `update`, which
does nothing when no bars are open, so a job works the same with and without a recipe. Only rank zero draws.
Where the output is not a terminal there are no bars, just one plain line per stage, without control codes.

A run of a sweep, often in a process of its own, cannot draw on the sweep's terminal: inside `progress_file` its
updates go into a small JSON file, which the sweep reads (`read_progress`) and draws.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import TextIO, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from workbench.files import atomic_file
from workbench.messages import elapsed, printable

_INTERVAL = 0.5


class Bars:
    """The bars of one recipe run; made by `bars`, reached by `current`.

    Args:
        total: Number of stages.
        width: Characters reserved for a stage's name.
        console: Where to write, or None to stay silent.
        live: Draw bars; otherwise only the line of each finished stage is written.
    """

    def __init__(self, total: int, width: int, console: Console | None, live: bool):
        self._console, self._width = console, width
        self._note = ""
        self._took: float | None = None
        self._progress: Progress | None = None
        self._recipe = self._stage = TaskID(0)
        self._runs: dict[str, TaskID] = {}
        if console is not None and live:
            self._progress = progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[message]}", style="dim", markup=False),
                console=console,
                transient=True,
            )
            self._recipe = progress.add_task("recipe".ljust(width), total=total, message="")
            self._stage = progress.add_task("", total=None, message="", visible=False, start=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The stage called ``name`` is at work inside; leaving writes its line and moves the recipe's bar.

        An exception passes through; the line then shows the failure and the bar stops.
        """
        label, start, outcome = printable(name).ljust(self._width), perf_counter(), "failed after "
        self._note, self._took = "", None
        if self._progress is not None:
            self._progress.reset(self._stage, description=label, message="", visible=True)
            # Neither reset nor update can unset the total, which makes the bar pulse.
            self._progress.tasks[1].total = None
        try:
            yield
            outcome = ""
        except (KeyboardInterrupt, SystemExit):
            outcome = "stopped after "
            raise
        finally:
            if self._progress is not None:
                self.show_runs({})
                self._progress.update(self._stage, visible=False)
                self._progress.update(self._recipe, advance=0 if outcome else 1)
            took = perf_counter() - start if self._took is None else self._took
            self.line(name, f"{outcome}{elapsed(took)}", self._note)

    def line(self, name: str, *words: str) -> None:
        """Print a line that stays above the bars, for a stage or a run that has ended; empty words are left out."""
        if self._console is not None:
            cells = (printable(name).ljust(self._width), *(printable(word) for word in words if word))
            self._console.print("  ".join(cells), markup=False, highlight=False, soft_wrap=True)

    def show_runs(self, runs: "Mapping[str, RunProgress]") -> None:
        """Draw one bar for each of ``runs``, by name, below the stage's own; bars of other runs are removed."""
        if self._progress is None:
            return
        for name in [name for name in self._runs if name not in runs]:
            self._progress.remove_task(self._runs.pop(name))
        for name, run in runs.items():
            if name not in self._runs:
                self._runs[name] = self._progress.add_task(f"  {printable(name)}", total=None, message="")
            total, message = run.total or None, printable(run.message)
            self._progress.update(self._runs[name], completed=run.done, total=total, message=message)

    def update(self, done: int, total: int, message: str) -> None:
        """See the module's `update`."""
        if self._progress is not None:
            self._progress.update(self._stage, completed=done, total=total, message=printable(message))

    def note(self, text: str, took: float | None = None) -> None:
        """Set the end of the current stage's line, such as ``val accuracy 98.1%``, and the seconds that it shows."""
        self._note, self._took = printable(text), took


@final
@dataclass(frozen=True)
class RunProgress:
    """How far a run of a sweep is: the contents of its progress file.

    Args:
        attempt: Number of the attempt, from 1.
        done: Steps done so far.
        total: Steps in all; 0 if not known yet.
        message: A few words.
    """

    attempt: int = 1
    done: int = 0
    total: int = 0
    message: str = ""


@final
class _ProgressWriter:
    """Writes a run's progress file and calls ``on_update``, each at most once every half second."""

    def __init__(self, path: Path, on_update: Callable[[], None]) -> None:
        self._path, self._on_update = path, on_update
        self._progress = RunProgress(count_attempts(path) + 1)
        self._last_write = monotonic()
        self._write()

    def update(self, done: int, total: int, message: str) -> None:
        """See the module's `update`."""
        if monotonic() - self._last_write >= _INTERVAL:
            self._last_write = monotonic()
            self._progress = replace(self._progress, done=done, total=total, message=message)
            self._write()
            self._on_update()

    def _write(self) -> None:
        # Not flushed to disk: what is lost in a power cut is not worth a pause in training, nor is a full disk.
        with suppress(OSError), atomic_file(self._path, durable=False) as temporary:
            temporary.write_text(json.dumps(asdict(self._progress)), encoding="utf-8")


@contextmanager
def progress_file(path: Path, on_update: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, rank zero's progress is written to the file ``path`` instead of being drawn.

    Args:
        path: The file. If it exists, an earlier attempt wrote it, and this attempt has the next number.
        on_update: Called after each write, so that the caller can draw what the file holds.
    """
    if not _is_rank_zero():
        yield
        return
    token = _active.set(_ProgressWriter(path, on_update))
    try:
        yield
    finally:
        _active.reset(token)


def read_progress(path: Path) -> RunProgress | None:
    """The contents of a progress file; None if it is missing or damaged."""
    try:
        return RunProgress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def count_attempts(path: Path) -> int:
    """How many attempts have written to the progress file ``path``."""
    progress = read_progress(path)
    return progress.attempt if progress else 0


_active: ContextVar[Bars | _ProgressWriter | None] = ContextVar("bars", default=None)


@contextmanager
def bars(total_stages: int, names: Sequence[str], file: TextIO | None = None) -> Iterator[Bars]:
    """Bars for a recipe of ``total_stages`` stages, drawn while inside.

    Silent on every rank but zero (``RANK``, ``LOCAL_RANK``), and inside other bars, which go on as they were.

    Args:
        total_stages: How many stages the recipe has.
        names: The stages' names, in order; they align the columns.
        file: Where to write; standard error if not given.

    Raises:
        ValueError: If the number of names is not ``total_stages``.
    """
    if len(names) != total_stages:
        raise ValueError(f"total_stages is {total_stages} but {len(names)} names were given: name every stage")
    stream = sys.stderr if file is None else file
    silent = _active.get() is not None or not _is_rank_zero()
    live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    console = None if silent else Console(file=stream) if live else _plain(stream)
    opened = Bars(total_stages, max([6, *(len(printable(name)) for name in names)]), console, live)
    token = _active.set(opened)
    try:
        if opened._progress is None:
            yield opened
        else:
            with opened._progress:
                yield opened
    finally:
        _active.reset(token)


def _is_rank_zero() -> bool:
    """Whether this process is rank zero or the only one; from the environment, as torch is not imported here."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


def _plain(stream: TextIO) -> Console:
    """A console that writes no control codes, even with FORCE_COLOR."""
    return Console(file=stream, force_terminal=False, color_system=None, force_jupyter=False)


def current() -> Bars | _ProgressWriter | None:
    """The open bars, or the writer that `progress_file` put in their place, or None."""
    return _active.get()


def update(done: int, total: int, message: str = "") -> None:
    """Put the current stage's bar at ``done`` of ``total`` steps; nothing happens when no bars are open.

    Args:
        done: Steps done so far.
        total: Steps in all.
        message: A few words, such as ``level 3, density 34.3%``.
    """
    if (active := _active.get()) is not None:
        active.update(done, total, message)
