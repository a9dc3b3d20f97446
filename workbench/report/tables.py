"""The tables of all stages, of every job: the main one and the provenance; and the captions of figures."""

from collections.abc import Callable, Iterable, Sequence

from workbench.records import Stage
from workbench.report.cells import Cell, Line, Table, exact, seconds, short, without_empty
from workbench.report.format import DASH, Metric, count, duration, percent, size, times
from workbench.report.rows import Row
from workbench.report.section import Summary
from workbench.report.summary import teachers_of


def main(summary: Summary, brief: bool = False) -> Table:
    """The main table: one line per finished stage. A column about which no stage knows anything is left out.

    Args:
        summary: The run.
        brief: For a terminal's width: without the columns that others imply.
    """
    alike, name, heading = _headings(summary)
    columns: list[tuple[str, bool, Callable[[Row], Cell]]] = [
        ("stage", False, lambda r: Cell(r.stage.name)),
        ("job", False, lambda r: Cell(r.stage.job or DASH, r.outcome.label)),
        ("activation", False, lambda r: Cell(r.activation or DASH)),
        ("from", False, _parent),
        ("parameters", True, lambda r: Cell(count(r.outcome.size.parameters))),
        ("kept", True, lambda r: Cell(count(r.outcome.size.kept))),
        ("model density", True, lambda r: Cell(percent(r.outcome.size.model_density))),
        ("density", True, lambda r: Cell(percent(r.outcome.size.density))),
        (f"test {name}", True, lambda r: _test(r, alike)),
        (heading, True, lambda r: _change(r, alike)),
        ("on disk", True, lambda r: Cell(size(r.stored.bytes), r.stored.label, exact(r.stored.bytes))),
        ("times smaller", True, lambda r: Cell(times(r.smaller))),
        ("took", True, lambda r: _took(r, brief)),
    ]
    columns = [column for column in columns if not (brief and column[0] in ("activation", "from", "kept"))]
    lines = [Line([cell(row) for _, _, cell in columns], row.stage.name) for row in summary.rows]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def legend(summary: Summary) -> str:
    """What the main table's derived columns are."""
    _, name, heading = _headings(summary)
    text = (
        f"{heading.capitalize()}: test {name} less that of the stage or level named. "
        "Model density: kept / all parameters. Density: kept / prunable weights; parameters that are not "
        "pruned are not in it."
    )
    if summary.reference is None:
        return text
    dense, name = size(summary.reference.dense_bytes), summary.reference.stage.name
    return f"{text} Times smaller: the {dense} of {name} in dense fp32 / bytes on disk."


def provenance(stages: Iterable[Stage]) -> Table:
    """Fingerprint, seed and start of each stage, whole."""
    lines = [
        Line(
            [
                Cell(stage.name),
                Cell(stage.fingerprint or DASH),
                Cell(DASH if stage.seed is None else str(stage.seed)),
                Cell(DASH if stage.started is None else stage.started.isoformat(sep=" ", timespec="seconds")),
                Cell(stage.status or DASH),
            ]
        )
        for stage in stages
    ]
    return Table(
        ["stage", "recipe fingerprint", "seed", "started", "status"], [False, False, True, False, False], lines
    )


def sample(summary: Summary, names: Iterable[str]) -> str:
    """The caption of a figure of stages: n, the interval's kind, the fingerprints of the stages drawn."""
    drawn = set(names)
    rows = [row for row in summary.rows if {row.stage.name, row.stage.family} & drawn]
    stages = [*(row.stage for row in rows), *(stage for stage in summary.others if stage.name in drawn)]
    listed = ", ".join(f"{stage.name} {short(stage.fingerprint)}" for stage in stages)
    seeds = known_seeds(rows)
    n = f"n = 1 seed ({list_seeds(seeds)})" if len(seeds) == 1 else f"n = 1 seed each ({list_seeds(seeds)})"
    n = n if rows else "n = 1 each"
    return f"{n}, no interval. Recipe fingerprints: {listed}."


def axis(measured: Metric, split: str) -> str:
    """A vertical axis in words: ``validation accuracy, higher is better``."""
    return f"{split} {measured.name}, {measured.direction}"


def known_seeds(rows: Sequence[Row]) -> set[int | None]:
    """Seeds of the stages; one that draws no random number, such as an export, has none to record."""
    return {row.stage.seed for row in rows if row.seeded} | {row.stage.seed for row in rows} - {None}


def list_seeds(seeds: set[int | None]) -> str:
    """``0, 7, not recorded``."""
    listed = [str(seed) for seed in sorted(seed for seed in seeds if seed is not None)]
    return ", ".join([*listed, *(["not recorded"] if None in seeds else [])])


def _headings(summary: Summary) -> tuple[bool, str, str]:
    """Whether all stages share one metric, and what the columns of it and of its differences are called."""
    first = summary.rows[0].metric
    alike = all(row.metric == first for row in summary.rows)
    return (True, first.name, first.heading) if alike else (False, "metric", "change")


def _took(row: Row, brief: bool) -> Cell:
    """As the terminal has it; beside it the time of its trainings, which leaves out loading, saving and scoring."""
    stage, took = row.stage, row.stage.spent
    notes = ["all together"] if stage.family and took is not None else []
    if not brief and stage.seconds is not None and duration(stage.seconds) != duration(took):
        notes.append(f"training {duration(stage.seconds)}")
    return Cell(duration(took), ", ".join(notes), seconds(took))


def _parent(row: Row) -> Cell:
    role, name = row.parent or ("", DASH)
    if len(teachers := teachers_of(row.stage)) > 1:
        return Cell(", ".join(teachers), "teachers")
    return Cell(name, "" if role == name else role)


def _test(row: Row, alike: bool) -> Cell:
    if row.test is None and row.reproduces:
        return Cell("same", f"as {row.reproduces}")
    title = "" if row.test is None else str(row.test)
    return Cell(row.metric.show(row.test), "" if alike or row.test is None else row.metric.name, title)


def _change(row: Row, alike: bool) -> Cell:
    unit = "" if alike or row.change is None else row.metric.unit
    return Cell(row.metric.change(row.change) + unit, f"vs {row.against}" if row.against else "")
