"""What a report shows of job ``export``: its files, and whether they were verified."""

from collections.abc import Sequence

from workbench.records import Export, ExportResult, Size, Stage
from workbench.report.blocks import Chapter, Grid, Part
from workbench.report.cells import Cell, Line, Table, exact
from workbench.report.format import DASH, size, times
from workbench.report.rows import Checkpoint, Outcome, Row
from workbench.report.section import Section, Summary


def exports_of(stage: Stage) -> list[Export]:
    """The files and folders in the stage's record."""
    return stage.result.exports if isinstance(stage.result, ExportResult) else []


def outcome(stage: Stage) -> Outcome:
    """On disk is the smallest format; those that have the predictions of what was exported are worth picking."""
    exports = exports_of(stage)
    verified = all(export.same_predictions for export in exports)
    # A level of a hunt has metrics of its own, which are not those of the hunt's row.
    level = stage.result.level if isinstance(stage.result, ExportResult) and stage.metrics else None
    own = None if level is None else stage.metrics
    every = [Checkpoint(export.bytes, export.format or "", own) for export in exports if export.bytes is not None]
    smallest = min(every, key=lambda each: each.bytes or 0, default=None)
    checkpoints = every if verified else []
    label = "" if level is None else f"level {level}"
    source = next((name for name, _ in stage.parents.values()), "")
    return Outcome(
        stage.metrics,
        stage.size or Size(),
        stage.history,
        label,
        None,
        smallest,
        checkpoints,
        compared=None if own is None else (f"{source}, {label}" if source else label, own),
        verified=verified,
    )


def chapters(stages: Sequence[Stage], summary: Summary) -> list[Chapter]:
    """One, with a table of every file."""
    return [Chapter("Exports", [Part([Grid(table(stages, summary), "exports")])])]


def table(stages: Sequence[Stage], summary: Summary) -> Table:
    """One line per exported file."""
    headers = ["stage", "format", "of", "on disk", "times smaller", "largest difference", "same predictions"]
    dense = summary.reference.dense_bytes if summary.reference else None
    rows = [row for stage in stages if (row := summary.row(stage.name)) is not None]
    lines = [_line(row, export, dense) for row in rows for export in exports_of(row.stage)]
    return Table(headers, [False, False, False, True, True, True, False], lines)


def _line(row: Row, export: Export, dense: float | None) -> Line:
    difference = DASH if export.largest_difference is None else f"{export.largest_difference:.2g}"
    return Line(
        [
            Cell(row.stage.name),
            Cell(export.format or DASH),
            Cell(row.parent[1] if row.parent else DASH),
            Cell(size(export.bytes), title=exact(export.bytes)),
            Cell(times(dense / export.bytes if dense and export.bytes else None)),
            Cell(difference),
            Cell({True: "yes, verified", False: "NO", None: DASH}[export.same_predictions]),
        ]
    )


SECTION = Section(
    order=70,
    shows=lambda stage: stage.finished and bool(exports_of(stage)),
    seeded=False,
    outcome=outcome,
    chapters=chapters,
)
"""What job ``export`` brings to a report."""
