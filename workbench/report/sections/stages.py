"""The section about stages: the main table, levels of hunts, exports, fingerprints."""

from collections.abc import Callable, Iterable, Sequence

from workbench.records import Barrier, Export, Stage
from workbench.report.cells import Cell, Line, Table, short, without_empty
from workbench.report.format import DASH, Metric, count, duration, percent, size, times
from workbench.report.summary import TOLERANCE, Curve, Facts, Hunt, LevelRow, Row, arms, dense_bytes, teachers_of


def stages(found: Facts, brief: bool = False) -> Table:
    """The main table: one line per finished stage. A column about which no stage knows anything is left out.

    Args:
        found: The run's facts.
        brief: For a terminal's width: without the columns that others imply.
    """
    alike, name, heading = _headings(found)
    columns: list[tuple[str, bool, Callable[[Row], Cell]]] = [
        ("stage", False, lambda r: Cell(r.stage.name)),
        ("job", False, lambda r: Cell(r.stage.job or DASH, _level(r.level))),
        ("activation", False, lambda r: Cell(r.activation or DASH)),
        ("from", False, _parent),
        ("parameters", True, lambda r: Cell(count(r.parameters))),
        ("kept", True, lambda r: Cell(count(r.kept))),
        ("density", True, lambda r: Cell(percent(r.density))),
        (f"test {name}", True, lambda r: _test(r, alike)),
        (heading, True, lambda r: _change(r, alike)),
        ("on disk", True, lambda r: Cell(size(r.bytes), r.form or "", _exact(r.bytes))),
        ("times smaller", True, lambda r: Cell(times(r.smaller))),
        ("took", True, _took),
    ]
    columns = [column for column in columns if not (brief and column[0] in ("activation", "from", "kept"))]
    lines = [Line([cell(row) for _, _, cell in columns], row.stage.name) for row in found.rows]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def legend(found: Facts) -> str:
    """What the main table's derived columns are."""
    _, name, heading = _headings(found)
    text = (
        f"{heading.capitalize()}: test {name} less that of the stage or level named. "
        "Density: kept / prunable weights; parameters that cannot be pruned are not in it."
    )
    if found.reference is None:
        return text
    dense, name = size(dense_bytes(found.reference)), found.reference.stage.name
    return f"{text} Times smaller: the {dense} of {name} in dense fp32 / bytes on disk."


def levels(hunt: Hunt) -> Table:
    """One line per level of a hunt, the picked one marked. A column about which nothing is known is left out."""
    measured = hunt.metric
    controls = [(f"test {arm}", lambda r, arm=arm: _control(r, arm, measured)) for arm in arms(hunt)]
    columns: list[tuple[str, Callable[[LevelRow], Cell]]] = [
        ("level", lambda r: Cell(count(r.level.level))),
        ("density", lambda r: Cell(percent(r.level.density))),
        ("kept", lambda r: Cell(count(r.level.size.get("kept")))),
        (f"val {measured.name}", lambda r: Cell(measured.show(r.validation))),
        (f"test {measured.name}", lambda r: Cell(measured.show(r.test))),
        (measured.heading, lambda r: Cell(measured.change(r.change))),
        *controls,
        ("dead units", _dead),
        ("gradient flow", lambda r: _figure(r.level.diagnosis.get("gradient_flow"))),
        ("barrier, other order", lambda r: _barrier(r.level.orders)),
        ("barrier, last level", lambda r: _barrier(r.level.last)),
        ("mask distance", lambda r: _figure(r.level.distances[-1] if r.level.distances else None)),
        ("took", lambda r: Cell(duration(r.level.seconds), title=_seconds(r.level.seconds))),
        ("mask", lambda r: Cell(short(r.level.mask_hash), title=r.level.mask_hash or "")),
    ]
    lines = [Line([cell(row) for _, cell in columns], hunt.stage.name, row is hunt.pick) for row in hunt.levels]
    return without_empty(Table([c[0] for c in columns], [c[0] != "mask" for c in columns], lines))


def columns(hunt: Hunt) -> str:
    """What the columns of a level table that not every hunt has are; empty if it has none."""
    known = [row.level for row in hunt.levels]
    told = {
        f"Test {', '.join(arms(hunt))}: the {hunt.metric.name} of what was trained beside the ticket": arms(hunt),
        "dead units: share that is the same for every input": any(lv.diagnosis.get("units") for lv in known),
        "gradient flow: squared norm of the gradient of the weights kept": any(
            "gradient_flow" in lv.diagnosis for lv in known
        ),
        "barrier: how far the straight line between two trainings, of the ticket with another order of the data, or "
        "of this level and the last, rises above the mean of its ends": any(lv.orders or lv.last for lv in known),
        "mask distance: share of the next mask that changed in the last epoch": any(lv.distances for lv in known),
    }
    text = "; ".join(text for text, there in told.items() if there)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def exports(found: Facts) -> Table | None:
    """One line per exported file; None if there is none."""
    headers = ["stage", "format", "of", "on disk", "times smaller", "largest difference", "same predictions"]
    dense = dense_bytes(found.reference) if found.reference else None
    lines = [_export(row, export, dense) for row in found.rows for export in row.stage.exports]
    return Table(headers, [False, False, False, True, True, True, False], lines) if lines else None


def prints(every: Iterable[Stage]) -> Table:
    """Fingerprint, seed and start of each stage, whole."""
    cells = [
        Line(
            [
                Cell(s.name),
                Cell(s.fingerprint or DASH),
                Cell(_seed(s)),
                Cell(_started(s)),
                Cell(s.status or DASH),
            ]
        )
        for s in every
    ]
    return Table(
        ["stage", "recipe fingerprint", "seed", "started", "status"],
        [False, False, True, False, False],
        cells,
    )


def sparsest(hunt: Hunt) -> str:
    """A hunt's pick in a sentence."""
    measured, margin = hunt.metric, hunt.metric.tolerance(TOLERANCE)
    if hunt.dense is None or hunt.dense.validation is None:
        return "No validation figure of level 0 is recorded, so no level is picked."
    if hunt.pick is None:
        return f"No sparser level stays within {margin} of level 0 on validation data."
    pick = hunt.pick
    text = (
        f"Sparsest level within {margin} of level 0 on validation data: level {count(pick.level.level)}, "
        f"density {percent(pick.level.density)}"
    )
    if pick.test is None or pick.change is None:
        return f"{text}."
    text += f"; its test {measured.name} is {measured.show(pick.test)}"
    return f"{text}, {measured.distance(pick.change)} level 0's."


def sample(found: Facts, names: Iterable[str]) -> str:
    """What stands under each figure: n, the interval's kind, the fingerprints of the stages drawn."""
    drawn = set(names)
    rows = [row for row in found.rows if {row.stage.name, row.stage.family} & drawn]
    stages = [*(row.stage for row in rows), *(stage for stage in found.aside if stage.name in drawn)]
    listed = ", ".join(f"{stage.name} {short(stage.fingerprint)}" for stage in stages)
    seeds = _known_seeds(rows)
    n = f"n = 1 seed ({_list(seeds)})" if len(seeds) == 1 else f"n = 1 seed each ({_list(seeds)})"
    n = n if rows else "n = 1 each"
    return f"{n}, no interval. Recipe fingerprints: {listed}."


def axis(curve: Curve, split: str) -> str:
    """The vertical axis in words: ``validation accuracy, higher is better``."""
    return f"{split} {curve.metric.name}, {curve.metric.direction}"


def _control(row: LevelRow, arm: str, measured: Metric) -> Cell:
    value = row.level.controls.get(arm, {}).get(f"test/{measured.name}")
    return Cell(measured.show(value), title=_plain(value))


def _dead(row: LevelRow) -> Cell:
    units, dead = (row.level.diagnosis.get(key) for key in ("units", "dead"))
    return Cell(DASH) if dead is None or not units else Cell(percent(dead / units), title=f"{dead:g} of {units:g}")


def _figure(value: float | None) -> Cell:
    return Cell(DASH if value is None else f"{value:.3g}", title=_plain(value))


def _barrier(found: Barrier | None) -> Cell:
    """Of errors, which are the ones that can be stable, in points."""
    if found is None:
        return Cell(DASH)
    if found.stable is None:
        return Cell(f"{found.height:.3g}", title=str(found.height))
    height = Metric("error", "min", True).change(found.height).lstrip("+")
    return Cell(height, "stable" if found.stable else "", str(found.height))


def _headings(found: Facts) -> tuple[bool, str, str]:
    """Whether all stages share one metric, and what the columns of it and of its differences are called."""
    measured = {row.metric for row in found.rows}
    first = found.rows[0].metric
    return (True, first.name, first.heading) if len(measured) == 1 else (False, "metric", "change")


def _took(row: Row) -> Cell:
    together = "all together" if row.stage.family and row.stage.seconds is not None else ""
    return Cell(duration(row.stage.seconds), together, _seconds(row.stage.seconds))


def _level(level: int | None) -> str:
    return "" if level is None else f"level {level}"


def _parent(row: Row) -> Cell:
    role, name = row.parent or ("", DASH)
    if len(teachers := teachers_of(row.stage)) > 1:
        return Cell(", ".join(teachers), "teachers")
    return Cell(name, "" if role == name else role)


def _test(row: Row, alike: bool) -> Cell:
    if row.test is None and row.reproduces:
        return Cell("same", f"as {row.reproduces}")
    return Cell(row.metric.show(row.test), "" if alike or row.test is None else row.metric.name, _plain(row.test))


def _change(row: Row, alike: bool) -> Cell:
    unit = "" if alike or row.change is None else row.metric.unit
    return Cell(row.metric.change(row.change) + unit, f"vs {row.against}" if row.against else "")


def _export(row: Row, export: Export, dense: float | None) -> Line:
    same = {True: "yes, verified", False: "NO", None: DASH}[export.same_predictions]
    difference = DASH if export.largest_difference is None else f"{export.largest_difference:.2g}"
    smaller = dense / export.bytes if dense and export.bytes else None
    cells = [
        Cell(row.stage.name),
        Cell(export.format or DASH),
        Cell(row.parent[1] if row.parent else DASH),
        Cell(size(export.bytes), title=_exact(export.bytes)),
        Cell(times(smaller)),
        Cell(difference),
        Cell(same),
    ]
    return Line(cells, row.stage.name)


def _known_seeds(rows: Sequence[Row]) -> set[int | None]:
    """Seeds of the stages; one that drew no random number, such as an export, has none to record."""
    drawn = (row.stage for row in rows if not (row.stage.exports or row.stage.job == "shrink"))
    return {stage.seed for stage in drawn} | {row.stage.seed for row in rows} - {None}


def _list(seeds: set[int | None]) -> str:
    known = ", ".join(str(seed) for seed in sorted(s for s in seeds if s is not None))
    return ", ".join(part for part in (known, "not recorded" if None in seeds else "") if part)


def _seed(stage: Stage) -> str:
    return DASH if stage.seed is None else str(stage.seed)


def _started(stage: Stage) -> str:
    return DASH if stage.started is None else stage.started.isoformat(sep=" ", timespec="seconds")


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} bytes"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value} s"


def _plain(value: float | None) -> str:
    return "" if value is None else str(value)
