"""Tables before any markup: the page and the terminal show the same cells."""

from dataclasses import dataclass, field
from itertools import compress

from workbench.report.format import DASH


@dataclass(frozen=True)
class Cell:
    """A cell's text; ``note`` is small beside it, ``title`` holds the exact value."""

    text: str
    note: str = ""
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A row of cells; ``stage`` gives its colour, ``marked`` highlights it."""

    cells: list[Cell]
    stage: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Column headings, whether each column holds numbers, and the lines."""

    headers: list[str]
    numeric: list[bool]
    lines: list[Line] = field(default_factory=list)


def short(fingerprint: str | None) -> str:
    """The first eight digits of a hash."""
    return fingerprint[:8] if fingerprint else DASH


def exact(value: float | None) -> str:
    """Bytes in full, for a cell's title."""
    return "" if value is None else f"{value:,.0f} bytes"


def seconds(value: float | None) -> str:
    """Seconds in full, for a cell's title."""
    return "" if value is None else f"{value} s"


def without_empty(table: Table) -> Table:
    """The table less the columns that hold nothing but dashes, the first one aside."""
    keep = [i == 0 or any(line.cells[i].text != DASH for line in table.lines) for i in range(len(table.headers))]
    lines = [Line(list(compress(line.cells, keep)), line.stage, line.marked) for line in table.lines]
    return Table(list(compress(table.headers, keep)), list(compress(table.numeric, keep)), lines)
