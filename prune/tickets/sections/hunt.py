"""What a report shows of job ``hunt``: its levels, which of them still has the dense score, and score by density."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.records import Barrier, HuntResult, Level, Size, Stage
from workbench.report.blocks import Chapter, Figure, Grid, Part, Text
from workbench.report.cells import Cell, Line, Table, seconds, short, without_empty
from workbench.report.format import DASH, Metric, count, duration, percent
from workbench.report.rows import Checkpoint, Outcome
from workbench.report.section import Section, Summary
from workbench.report.summary import TOLERANCE, near
from workbench.report.tables import axis, sample


@dataclass(frozen=True)
class LevelRow:
    """One level of a hunt; ``change`` is its test metric less that of the dense level."""

    level: Level
    validation: float | None
    test: float | None
    change: float | None


@dataclass(frozen=True)
class Hunt:
    """A hunt's levels, its dense one, and the sparsest within ``margin`` of it on validation data, as ``1 point``."""

    stage: Stage
    metric: Metric
    levels: list[LevelRow]
    dense: LevelRow | None
    pick: LevelRow | None
    margin: str


@dataclass(frozen=True)
class Curve:
    """The main test metric of a hunt against density, densest first.

    Attributes:
        stage: The hunt.
        metric: The metric.
        x: Densities.
        y: Test metric of the tickets.
        dense: That of level 0.
        controls: Control -> its densities and test metric.
    """

    stage: str
    metric: Metric
    x: list[float]
    y: list[float]
    dense: float | None = None
    controls: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def levels_of(stage: Stage) -> list[Level]:
    """The levels in the stage's record."""
    return stage.result.levels if isinstance(stage.result, HuntResult) else []


def outcome(stage: Stage) -> Outcome:
    """The hunt's own metrics and size, or its last level's; the level that it recommends is the one to pick."""
    every = levels_of(stage)
    last, dense = every[-1], _dense(stage)
    metrics = stage.metrics or last.metrics
    size = stage.size if stage.size not in (None, Size()) else last.size or Size()
    same = [lv.level for lv in every if lv.metrics == metrics and _size(lv).kept == size.kept]
    label = _name(same[0]) if len(same) == 1 else ""
    own = Checkpoint(size.checkpoint_bytes, label, metrics)
    # What is picked from a hunt is what it recommends and what exports take, where that is known.
    chosen = recommended(stage)
    offered = every if chosen is None else [level for level in every if level.level == chosen[0]]
    checkpoints = [Checkpoint(_size(lv).checkpoint_bytes, _name(lv.level), lv.metrics) for lv in offered]
    return Outcome(
        metrics,
        size,
        dense.history if dense else (),
        label,
        dense=("level 0", dense.metrics if dense else {}),
        stored=replace(own, label=""),
        checkpoints=[own, *checkpoints] if chosen is None or own.label == _name(chosen[0]) else checkpoints,
        measured=[each.metrics for level in every for each in (level, *level.controls.values())],
    )


def hunt_of(stage: Stage, measured: Metric) -> Hunt:
    """A hunt's levels compared with level 0; the pick looks at validation data only."""
    name, first = measured.name, _dense(stage)
    base = None if first is None else first.metrics.get(f"test/{name}")
    rows = []
    for level in levels_of(stage):
        test = level.metrics.get(f"test/{name}")
        change = None if test is None or base is None else test - base
        rows.append(LevelRow(level, level.metrics.get(f"val/{name}"), test, change))
    dense = next((row for row in rows if row.level is first), None)
    if (chosen := recommended(stage)) is not None:
        winning, tolerance = chosen
        pick = next((row for row in rows if row.level.level == winning and row is not dense), None)
        return Hunt(stage, measured, rows, dense, pick, measured.margin(tolerance))
    good = [r for r in rows if dense and near(r.validation, dense.validation, measured)]
    good = [r for r in good if r.level.density is not None and r is not dense]
    pick = min(good, key=lambda r: r.level.density or 0, default=None)
    return Hunt(stage, measured, rows, dense, pick, measured.tolerance(TOLERANCE))


def recommended(stage: Stage) -> tuple[int, float] | None:
    """The level that the hunt itself found to be the sparsest within its tolerance, which exports take; and that."""
    result = stage.result
    if not isinstance(result, HuntResult) or result.winning is None or result.tolerance is None:
        return None
    return result.winning, result.tolerance


def hunts_of(stages: Sequence[Stage], summary: Summary) -> list[Hunt]:
    """All hunts of a run."""
    return [hunt_of(stage, summary.metrics[stage.monitor]) for stage in stages]


def chapters(stages: Sequence[Stage], summary: Summary) -> list[Chapter]:
    """One, with a table of levels for each hunt."""
    parts = []
    for hunt in hunts_of(stages, summary):
        blocks: list[Any] = [Text(sparsest(hunt)), Grid(levels(hunt), "levels")]
        blocks += [Text(text, "small")] if (text := columns(hunt)) else []
        parts.append(Part(blocks, hunt.stage.name))
    return [Chapter("Levels", parts)]


def figures(stages: Sequence[Stage], summary: Summary) -> list[Figure]:
    """Score against density of hunts that no other section covers, one image per metric."""
    curves = sparsity(hunts_of(stages, summary), summary.covered)
    if not curves:
        return []
    from workbench.report.figures import by_metric  # matplotlib takes seconds, and a terminal shows no figure

    images = {
        name: draw_sparsity(name, axis(group[0].metric, "test"), group, summary.colours)
        for name, group in by_metric("density", curves)
    }
    about = (
        "The main test metric at each level, densest left; dashed, the same hunt's dense level 0. A "
        "curve shows how far a network can be pruned; that its weights are a winning ticket takes "
        "controls with re-drawn weights and shuffled masks."
    )
    if any(curve.controls for curve in curves):
        about += " Thin, its controls."
    return [Figure("Score against density", about, sample(summary, [c.stage for c in curves]), images)]


def sparsity(hunts: Iterable[Hunt], covered: Iterable[str] = ()) -> list[Curve]:
    """The main test metric against density, one curve a hunt that is not ``covered``."""
    curves = []
    for hunt in hunts:
        x, y = _points((r.level.density, r.test) for r in hunt.levels)
        if not x or hunt.stage.name in covered:
            continue
        dense = hunt.dense.test if hunt.dense and _finite(hunt.dense.test) else None
        key = f"test/{hunt.metric.name}"
        controls = {arm: _points((r.level.density, _control(r, arm, key)) for r in hunt.levels) for arm in arms(hunt)}
        curves.append(Curve(hunt.stage.name, hunt.metric, x, y, dense, {a: p for a, p in controls.items() if p[0]}))
    return curves


def arms(hunt: Hunt) -> list[str]:
    """The controls that were trained beside the hunt's tickets."""
    return list(dict.fromkeys(arm for row in hunt.levels for arm in row.level.controls))


def levels(hunt: Hunt) -> Table:
    """One line per level of a hunt, the picked one marked. A column about which nothing is known is left out."""
    measured = hunt.metric
    key = f"test/{measured.name}"

    def control(arm: str) -> Callable[[LevelRow], Cell]:
        return lambda row: Cell(measured.show(score := _control(row, arm, key)), title=_plain(score))

    def barrier(title: str, other: str, split: str) -> tuple[str, Callable[[LevelRow], Cell]]:
        return title, lambda row: _barrier(_barriers(row, other).get(split))

    columns: list[tuple[str, Callable[[LevelRow], Cell]]] = [
        ("level", lambda r: Cell(count(r.level.level))),
        ("model density", lambda r: Cell(percent(r.level.model_density))),
        ("density", lambda r: Cell(percent(r.level.density))),
        ("kept", lambda r: Cell(count(_size(r.level).kept))),
        (f"val {measured.name}", lambda r: Cell(measured.show(r.validation))),
        (f"test {measured.name}", lambda r: Cell(measured.show(r.test))),
        (measured.heading, lambda r: Cell(measured.change(r.change))),
        *((f"test {arm}", control(arm)) for arm in arms(hunt)),
        ("dead units", _dead),
        ("gradient flow", lambda r: _number(_diagnosis(r, "gradient_flow"))),
        *(barrier(*column) for column in barrier_columns(hunt)),
        ("mask distance", lambda r: _number(r.level.mask_distances[-1] if r.level.mask_distances else None)),
        ("took", lambda r: Cell(duration(r.level.seconds), title=seconds(r.level.seconds))),
        ("mask", lambda r: Cell(short(r.level.mask_hash), title=r.level.mask_hash or "")),
    ]
    lines = [Line([cell(row) for _, cell in columns], marked=row is hunt.pick) for row in hunt.levels]
    return without_empty(Table([c[0] for c in columns], [c[0] != "mask" for c in columns], lines))


def columns(hunt: Hunt) -> str:
    """What the columns of a level table that not every hunt has are; empty if it has none."""
    rows = hunt.levels
    texts = {
        f"Test {', '.join(arms(hunt))}: the {hunt.metric.name} of what was trained beside the ticket": arms(hunt),
        "dead units: share that is the same for every input": any(_diagnosis(row, "units") for row in rows),
        "gradient flow: squared norm of the gradient of the weights kept": any(
            _diagnosis(row, "gradient_flow") is not None for row in rows
        ),
        f"{' and '.join(_splits(hunt))} barrier: how far the straight line between two trainings, of the ticket with "
        "another order of the data, or of this level and the last, rises above the mean of its ends": _splits(hunt),
        "mask distance: how far the next mask moved in the last epoch, of what unrelated masks are apart": any(
            row.level.mask_distances for row in rows
        ),
    }
    text = "; ".join(text for text, there in texts.items() if there)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def barrier_columns(hunt: Hunt) -> list[tuple[str, str, str]]:
    """Header, other end and split of every column of barriers."""
    ends = {"orders": "other order", "levels": "last level"}
    return [(f"{split} barrier, {end}", other, split) for split in _splits(hunt) for other, end in ends.items()]


def sparsest(hunt: Hunt) -> str:
    """A hunt's pick in a sentence."""
    measured, margin = hunt.metric, hunt.margin
    if hunt.dense is None or hunt.dense.validation is None:
        return "No validation figure of level 0 is recorded, so no level is picked."
    if hunt.pick is None:
        return f"No sparser level stays within {margin} of level 0 on validation data{_missed(hunt)}."
    pick = hunt.pick
    text = (
        f"Sparsest level within {margin} of level 0 on validation data: level {count(pick.level.level)}, "
        f"{densities(pick.level)}"
    )
    if pick.test is not None and pick.change is not None:
        text += f"; its test {measured.name} is {measured.show(pick.test)}"
        text += f", {measured.distance(pick.change)} level 0's"
    return f"{text}{_missed(hunt)}."


def _missed(hunt: Hunt) -> str:
    """Why the next level is not picked: by how much its validation score misses; empty if there is none."""
    last = hunt.pick or hunt.dense
    row = None if last is None else next(iter(hunt.levels[hunt.levels.index(last) + 1 :]), None)
    if row is None or row.validation is None or hunt.dense is None or hunt.dense.validation is None:
        return ""
    if hunt.metric.within(row.validation, hunt.dense.validation, 0):
        return ""
    change = hunt.metric.distance(row.validation - hunt.dense.validation)
    return f"; level {count(row.level.level)} is {change} level 0 on validation data"


def densities(level: Level) -> str:
    """Both densities of a level, the model's first: ``14% of the model, density 10%``."""
    whole = "" if level.model_density is None else f"{percent(level.model_density)} of the model, "
    return f"{whole}density {percent(level.density)}"


def draw_sparsity(name: str, title: str, curves: Sequence[Curve], colours: Mapping[str, int]) -> str:
    """The metric against density as SVG, densest left, with each hunt's dense level as a dashed line."""
    from matplotlib.axes import Axes  # seconds to import, and a terminal shows no figure

    from workbench.report.figures import cut, density_axis, label, line, value_axis
    from workbench.report.svg import LIGHT, drawn

    def draw(axes: Axes) -> None:
        labels = []
        end = density_axis(axes, [c.x for c in curves])
        for curve in curves:
            for arm, (x, y) in curve.controls.items():
                axes.plot(x, y, color=LIGHT[f"series-{colours[curve.stage]}"], lw=0.8, marker=".", markersize=3)
                labels.append((f"{cut(curve.stage, 13)}, {cut(arm, 10)}", x[-1], y[-1], colours[curve.stage]))
            axes.plot(curve.x, curve.y, **line(colours[curve.stage]), markersize=5)
            labels.append((cut(curve.stage), curve.x[-1], curve.y[-1], colours[curve.stage]))
            if curve.dense is not None:
                axes.axhline(curve.dense, color=LIGHT[f"series-{colours[curve.stage]}"], lw=1, ls=(0, (5, 4)))
                labels.append((f"{cut(curve.stage, 15)}, level 0", end, curve.dense, colours[curve.stage]))
        value_axis(axes, curves[0].metric)
        label(axes, labels)

    rows = sum(2 + len(curve.controls) for curve in curves)
    return drawn(name, title, (5.6, max(3.2, 1.2 + 0.24 * rows)), draw)


def _control(row: LevelRow, arm: str, key: str) -> float | None:
    control = row.level.controls.get(arm)
    return control.metrics.get(key) if control else None


def _diagnosis(row: LevelRow, name: str) -> float | None:
    return getattr(row.level.diagnosis, name, None)


def _barriers(row: LevelRow, other: str) -> dict[str, Barrier]:
    """By split."""
    return getattr(row.level.connectivity, other, {})


def _splits(hunt: Hunt) -> list[str]:
    """The splits that barriers are measured on, in the order of the record."""
    ends = [_barriers(row, other) for row in hunt.levels for other in ("orders", "levels")]
    return list(dict.fromkeys(split for barriers in ends for split in barriers))


def _dead(row: LevelRow) -> Cell:
    units, dead = _diagnosis(row, "units"), _diagnosis(row, "dead")
    return Cell(DASH) if dead is None or not units else Cell(percent(dead / units), title=f"{dead:g} of {units:g}")


def _number(value: float | None) -> Cell:
    return Cell(DASH if value is None else f"{value:.3g}", title=_plain(value))


def _barrier(barrier: Barrier | None) -> Cell:
    """Of errors, which are the ones that can be stable, in points."""
    if barrier is None:
        return Cell(DASH)
    if barrier.stable is None:
        return Cell(f"{barrier.barrier:.3g}", title=str(barrier.barrier))
    height = Metric("error", "min", True).change(barrier.barrier).lstrip("+")
    return Cell(height, "stable" if barrier.stable else "", str(barrier.barrier))


def _points(measured: Iterable[tuple[float | None, float | None]]) -> tuple[list[float], list[float]]:
    """Densities and values of the pairs that have both, densest first."""
    points = sorted(((d, v) for d, v in measured if d and d > 0 and v is not None and math.isfinite(v)), reverse=True)
    return [d for d, _ in points], [v for _, v in points]


def _dense(stage: Stage) -> Level | None:
    return next((level for level in levels_of(stage) if level.level == 0), None)


def _size(level: Level) -> Size:
    return level.size or Size()


def _name(level: int | None) -> str:
    return "" if level is None else f"level {level}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: float | None) -> str:
    return "" if value is None else str(value)


SECTION = Section(
    order=60,
    shows=lambda stage: stage.finished and bool(levels_of(stage)),
    outcome=outcome,
    colours=lambda stages: [stage.name for stage in stages if _points((lv.density, 1.0) for lv in levels_of(stage))[0]],
    figures=figures,
    chapters=chapters,
)
"""What job ``hunt`` brings to a report."""
