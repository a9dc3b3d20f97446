"""What the page is made of, before any markup: chapters, their parts, and texts, tables and figures in these."""

from dataclasses import dataclass
from typing import Literal

from workbench.report.cells import Table


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text; it is escaped.
        style: ``quiet`` is paler, ``small`` paler and smaller, as a table's legend.
    """

    text: str
    style: Literal["plain", "quiet", "small"] = "plain"


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        table: Its cells.
        kind: CSS class of the table; the template has styles for those of this project's jobs.
        caption: Above it.
        fold: Where it is folded away, what to click on.
    """

    table: Table
    kind: str = ""
    caption: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure; the page numbers it.

    Attributes:
        title: After its number.
        about: What it shows.
        sample: n, the kind of interval, and fingerprints.
        images: File name without suffix -> SVG, side by side. Names are unique in a report.
    """

    title: str
    about: str
    sample: str
    images: dict[str, str]


@dataclass(frozen=True)
class Gallery:
    """Figures side by side as far as the width allows, and a table beside them."""

    figures: list[Figure]
    beside: Grid | None = None


@dataclass(frozen=True)
class Part:
    """Blocks under a heading; without ``title`` there is none."""

    blocks: list[Text | Grid | Gallery]
    title: str = ""


@dataclass(frozen=True)
class Chapter:
    """Parts under one heading."""

    title: str
    parts: list[Part]

    @property
    def figures(self) -> list[Figure]:
        """All of its figures, in order."""
        blocks = [block for part in self.parts for block in part.blocks]
        return [figure for block in blocks if isinstance(block, Gallery) for figure in block.figures]
