"""Two progress bars for a recipe: the whole of it above, the stage at work below.

The runner opens `bars` and wraps each stage in `Bars.stage`; whatever does the work calls `show`, which
does nothing when no bars are open, so a job needs to know nothing about who started it. Only rank zero draws.
Where the output is not a terminal there are no bars, just one plain line per stage, without control codes.

A run of a sweep draws nothing: inside `telling` what it shows goes into a small file, which the sweep reads and draws.
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

from workbench.messages import elapsed, printable

_EVERY = 0.5


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
        self._progress: Progress | None = None
        self._recipe = self._stage = TaskID(0)
        self._parts: dict[str, TaskID] = {}
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

        An exception passes through; the line then says that the stage failed and the bar does not move.
        """
        label, start, outcome = printable(name).ljust(self._width), perf_counter(), "failed after "
        self._note = ""
        if self._progress is not None:
            self._progress.reset(self._stage, description=label, message="", visible=True)
            # Neither reset nor update can say "no total yet", which is what makes the bar pulse.
            self._progress.tasks[1].total = None
        try:
            yield
            outcome = ""
        except (KeyboardInterrupt, SystemExit):
            outcome = "stopped after "
            raise
        finally:
            if self._progress is not None:
                self.parts({})
                self._progress.update(self._stage, visible=False)
                self._progress.update(self._recipe, advance=0 if outcome else 1)
            self.line(name, f"{outcome}{elapsed(perf_counter() - start)}", self._note)

    def line(self, name: str, *told: str) -> None:
        """Write a line that stays, above the bars: of a stage that is over, or of a part of one."""
        if self._console is not None:
            words = (printable(name).ljust(self._width), *(printable(word) for word in told if word))
            self._console.print("  ".join(words), markup=False, highlight=False, soft_wrap=True)

    def parts(self, told: "Mapping[str, Told]") -> None:
        """Draw a bar for each part of the stage that is at work, below the stage's own; and for no other."""
        if self._progress is None:
            return
        for name in [name for name in self._parts if name not in told]:
            self._progress.remove_task(self._parts.pop(name))
        for name, part in told.items():
            if name not in self._parts:
                self._parts[name] = self._progress.add_task(f"  {printable(name)}", total=None, message="")
            total, said = part.total or None, printable(part.message)
            self._progress.update(self._parts[name], completed=part.done, total=total, message=said)

    def show(self, done: int, total: int, message: str) -> None:
        """See the module's `show`."""
        if self._progress is not None:
            self._progress.update(self._stage, completed=done, total=total, message=printable(message))

    def note(self, text: str) -> None:
        """What to say at the end of the current stage's line, such as ``val accuracy 98.1%``."""
        self._note = printable(text)


@final
@dataclass(frozen=True)
class Told:
    """How far a run is.

    Args:
        attempt: Which it is, from 1.
        done: Of its steps.
        total: Its steps, if it has said so, else 0.
        message: A few words.
    """

    attempt: int = 1
    done: int = 0
    total: int = 0
    message: str = ""


@final
class _Teller:
    """Writes how far a run is, at most once every half second; ``look`` is called as often."""

    def __init__(self, path: Path, look: Callable[[], None]) -> None:
        self._path, self._look = path, look
        self._told = Told(attempts(path) + 1)
        self._at = monotonic()
        self._write()

    def show(self, done: int, total: int, message: str) -> None:
        """See the module's `show`."""
        if monotonic() - self._at >= _EVERY:
            self._at, self._told = monotonic(), replace(self._told, done=done, total=total, message=message)
            self._write()
            self._look()

    def _write(self) -> None:
        # Not flushed to disk: what is lost in a power cut is not worth a pause in training, nor is a full disk.
        part = self._path.with_name(f"{self._path.name}.tmp")
        with suppress(OSError):
            part.write_text(json.dumps(asdict(self._told)), encoding="utf-8")
            part.replace(self._path)


@contextmanager
def telling(path: Path, look: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, what is shown goes into the file ``path``, for somebody else to draw; what rank zero shows, that is.

    Args:
        path: The file; one that is there is of an earlier attempt.
        look: Called now and then, to draw it.
    """
    if not _leads():
        yield
        return
    token = _active.set(_Teller(path, look))
    try:
        yield
    finally:
        _active.reset(token)


def told(path: Path) -> Told | None:
    """What was last told into ``path``; None if nothing was."""
    try:
        return Told(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def attempts(path: Path) -> int:
    """How often somebody began to tell something into ``path``."""
    found = told(path)
    return found.attempt if found else 0


_active: ContextVar[Bars | _Teller | None] = ContextVar("bars", default=None)


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
    silent = _active.get() is not None or not _leads()
    live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    console = None if silent else Console(file=stream) if live else _plain(stream)
    made = Bars(total_stages, max([6, *(len(printable(name)) for name in names)]), console, live)
    token = _active.set(made)
    try:
        if made._progress is None:
            yield made
        else:
            with made._progress:
                yield made
    finally:
        _active.reset(token)


def _leads() -> bool:
    """Whether this is rank zero, or alone."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


def _plain(stream: TextIO) -> Console:
    """A console that writes no control codes, whatever FORCE_COLOR says."""
    return Console(file=stream, force_terminal=False, color_system=None, force_jupyter=False)


def current() -> Bars | _Teller | None:
    """The open bars, or what is there instead of them, or None."""
    return _active.get()


def show(done: int, total: int, message: str = "") -> None:
    """Put the current stage's bar at ``done`` of ``total`` steps; nothing happens when no bars are open.

    Args:
        done: Steps done so far.
        total: Steps in all.
        message: A few words, such as ``level 3, density 34.3%``.
    """
    if (active := _active.get()) is not None:
        active.show(done, total, message)
