"""Records of a run into one self-contained page, and the same table for the terminal.

`report` is the job, `summary` what a terminal shows. `summary.py` makes rows and the pick of stages, `tables` and
`headline` texts of these, `section` finds what jobs show of their own; `page` and `figures` draw all of it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from workbench import records
from workbench.files import atomic_file
from workbench.report import headline
from workbench.report.summary import gather

if TYPE_CHECKING:
    from rich.table import Table


def report(out: Path, run: Path | None = None, title: str | None = None) -> dict:
    """Write a page about a run: density, scores, cost and savings of each stage, and how it was made.

    The page is one file, without scripts or external resources, in light and dark. The same records give the same
    bytes.

    Args:
        out: This stage's own folder; ``index.html`` and ``figures/*.svg`` are written there.
        run: The run's folder, one folder per stage; the folder that holds ``out`` if not given.
        title: The page's heading; the name of the run's folder if not given.

    Returns:
        ``{"page": "index.html"}``.

    Raises:
        ValueError: If the run has no finished stage, or a record in it is malformed.
    """
    from workbench.report.page import render

    folder = out.parent if run is None else run
    stages = records.read_run(folder, own=out)
    page, figures = render(stages, title or folder.resolve().name, folder.resolve().name)
    for name, svg in figures.items():
        with atomic_file(out / "figures" / f"{name}.svg") as temporary:
            temporary.write_text(svg, encoding="utf-8")
    for old in (out / "figures").glob("*.svg"):
        if old.stem not in figures:
            old.unlink()
    with atomic_file(out / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {"page": "index.html"}


def summary(run: Path) -> "Table":
    """The report's main table for a terminal, its one-sentence summary below.

    Args:
        run: The run's folder, one folder per stage.

    Raises:
        ValueError: If the run has no finished stage, or a record in it is malformed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    gathered = gather(records.read_run(run))
    cells = headline.table(gathered)
    caption = Text("\n".join(headline.lines(gathered)), style="")
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header, numeric in zip(cells.headers, cells.numeric):
        table.add_column(Text(header), justify="right" if numeric else "left", overflow="fold")
    for line in cells.lines:
        table.add_row(*(Text.assemble(c.text, (f"\n{c.note}" if c.note else "", "dim")) for c in line.cells))
    return table
