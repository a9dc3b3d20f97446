"""Stages into what a report says about them: rows, hunts, curves and the pick. Pure functions of records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from workbench.records import Export, Level, Stage, covered, expand
from workbench.report.format import Metric, metric

TOLERANCE = 0.01
"""How much worse than the reference a pick may be on validation data: one point of a share, else 1%."""


@dataclass(frozen=True)
class Row:
    """One finished stage in numbers; None where the records say nothing.

    Attributes:
        stage: The stage.
        metric: Its main metric.
        level: The hunt's level that the stage's own figures belong to.
        activation: The activation's name, its own or inherited from the network it started from.
        parent: Role and name of the stage it came from.
        parameters: Parameters in all.
        kept: Weights kept, out of the prunable ones.
        density: Kept / prunable.
        validation: The main metric on validation data.
        test: The main metric on test data.
        against: What ``change`` is measured against.
        change: ``test`` less that of ``against``.
        bytes: Bytes on disk; of an export stage, of its smallest format.
        form: That format.
        smaller: The reference's dense fp32 bytes / ``bytes``.
        reproduces: The stage whose predictions every export was verified to reproduce.
    """

    stage: Stage
    metric: Metric
    level: int | None
    activation: str | None
    parent: tuple[str, str] | None
    parameters: float | None
    kept: float | None
    density: float | None
    validation: float | None
    test: float | None
    against: str | None
    change: float | None
    bytes: float | None
    form: str | None
    smaller: float | None
    reproduces: str | None


@dataclass(frozen=True)
class LevelRow:
    """One level of a hunt; ``change`` is its test metric less that of the dense level."""

    level: Level
    validation: float | None
    test: float | None
    change: float | None


@dataclass(frozen=True)
class Hunt:
    """A hunt's levels, its dense one, and the sparsest within the tolerance of it on validation data."""

    stage: Stage
    metric: Metric
    levels: list[LevelRow]
    dense: LevelRow | None
    pick: LevelRow | None


@dataclass(frozen=True)
class Curve:
    """Points of one stage to draw.

    Attributes:
        dense: The test metric of a hunt's level 0.
        controls: Of a hunt, control -> its points.
    """

    stage: str
    metric: Metric
    x: list[float]
    y: list[float]
    dense: float | None = None
    controls: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pick:
    """The smallest checkpoint within the tolerance on validation data, and whose figures it has."""

    row: Row
    level: int | None
    form: str | None
    bytes: float
    source: str
    test: float | None


@dataclass(frozen=True)
class Facts:
    """Everything a report says.

    ``reference`` is the teacher, or else the first stage with a size, of a hunt its dense level; ``aside`` are finished
    stages that trained and measured no network of their own, such as a cache or a comparison; ``sweeps`` are those
    whose runs are known, finished or not; ``covered`` are names of hunts and sweeps that a verdict tells of.
    """

    rows: list[Row]
    aside: list[Stage]
    hunts: list[Hunt]
    unfinished: list[Stage]
    reference: Row | None
    pick: Pick | None
    verdicts: list[Stage]
    sweeps: list[Stage]
    covered: set[str]


def gather(stages: Sequence[Stage]) -> Facts:
    """What the stages of a run, in their order, say; finished reports measure nothing, so are left out.

    Raises:
        ValueError: If no stage is finished.
    """
    told = [s for s in expand(stages) if not (s.job == "report" and s.status == "finished")]
    finished = [s for s in told if s.status == "finished"]
    unfinished = [s for s in told if s.status != "finished"]
    sweeps = [s for s in told if s.runs]
    if not finished and not sweeps:
        found = ", ".join(f"{s.name}: {s.status}" for s in unfinished) or "nothing but reports"
        raise ValueError(f"no finished stage to report on ({found}): run the recipe again, it resumes where it stopped")
    named = {s.name: s for s in finished}
    verdicts = [s for s in finished if s.verdicts]
    measured = [s for s in finished if not _aside(s)] or ([] if verdicts or sweeps else finished)
    metrics = _metrics(measured)
    hunts = [_hunt(s, metrics[s.monitor]) for s in measured if s.levels]
    sized = [s for s in measured if _outcome(s)[1].get("dense_fp32_bytes")]
    teachers = {parent for s in finished for parent in teachers_of(s)}
    reference = next((s for s in sized if s.name in teachers), sized[0] if sized else None)
    dense = None if reference is None else _outcome(reference)[1]["dense_fp32_bytes"]
    rows = [_row(s, named, metrics, dense) for s in measured]
    first = next((_dense_row(r) for r in rows if reference is not None and r.stage.name == reference.name), None)
    aside = [s for s in finished if s not in measured]
    pick = None if first is None else _pick(rows, hunts, first)
    return Facts(rows, aside, hunts, unfinished, first, pick, verdicts, sweeps, covered(told))


def dense_bytes(row: Row) -> float | None:
    """What the stage's weights take in dense fp32."""
    return _outcome(row.stage)[1].get("dense_fp32_bytes")


def teachers_of(stage: Stage) -> list[str]:
    """The stages that taught it."""
    return [name for role, (name, _) in stage.parents.items() if _teaches(role)]


def stale(stages: Iterable[Stage]) -> list[tuple[str, str]]:
    """Pairs of a stage and a parent that has been run anew, with other arguments, after the stage."""
    stages = list(stages)
    now = {s.name: s.fingerprint for s in (*stages, *expand(stages))}
    now |= {f"{s.name}/{run.name}": run.fingerprint for s in stages for run in s.runs}
    return [
        (s.name, parent)
        for s in stages
        for parent, print_ in s.parents.values()
        if print_ and now.get(parent) and now[parent] != print_
    ]


def learning(found: Facts) -> list[Curve]:
    """The main validation metric after each epoch, one curve a stage; of a hunt, that of its dense level."""
    curves = []
    for row in found.rows:
        hunt = next((h for h in found.hunts if h.stage is row.stage), None)
        history = row.stage.history if hunt is None else hunt.dense.level.history if hunt.dense else []
        points = sorted((e["epoch"] + 1, e[f"val/{row.metric.name}"]) for e in history if _has(e, row.metric))
        if points:
            x, y = [epoch for epoch, _ in points], [value for _, value in points]
            curves.append(Curve(row.stage.name, row.metric, x, y))
    return curves


def sparsity(found: Facts) -> list[Curve]:
    """The main test metric against density, densest first, one curve a hunt that no verdict tells of."""
    curves = []
    for hunt in found.hunts:
        x, y = _points((r.level.density, r.test) for r in hunt.levels)
        if not x or hunt.stage.name in found.covered:
            continue
        dense = hunt.dense.test if hunt.dense and _finite(hunt.dense.test) else None
        key = f"test/{hunt.metric.name}"
        controls = {
            arm: _points((r.level.density, r.level.controls.get(arm, {}).get(key)) for r in hunt.levels)
            for arm in arms(hunt)
        }
        curves.append(Curve(hunt.stage.name, hunt.metric, x, y, dense, {a: p for a, p in controls.items() if p[0]}))
    return curves


def arms(hunt: Hunt) -> list[str]:
    """The controls that were trained beside the hunt's tickets."""
    return list(dict.fromkeys(arm for row in hunt.levels for arm in row.level.controls))


def _points(measured: Iterable[tuple[float | None, float | None]]) -> tuple[list[float], list[float]]:
    """Densities and values of the pairs that have both, densest first."""
    points = sorted(((d, v) for d, v in measured if d and d > 0 and v is not None and math.isfinite(v)), reverse=True)
    return [d for d, _ in points], [v for _, v in points]


def _metrics(stages: Iterable[Stage]) -> dict[tuple[str, str], Metric]:
    """One metric per monitor; whether it is a share is decided by all its values in the run."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for stage in stages:
        trained = [own for level in stage.levels for own in (level.metrics, *level.controls.values())]
        for recorded in (stage.metrics, *trained):
            for split in ("val", "test"):
                values.setdefault(stage.monitor, []).append(recorded.get(f"{split}/{stage.monitor[0]}"))
    return {monitor: metric(*monitor, found) for monitor, found in values.items()}


def _aside(stage: Stage) -> bool:
    """Whether there is nothing about it that a row of the main table would tell."""
    told = (stage.metrics, stage.size, stage.levels, stage.history, stage.exports)
    return stage.job is not None and not any(told)


def _outcome(stage: Stage) -> tuple[dict[str, float], dict[str, float], int | None]:
    """A stage's metrics and size, a hunt's last level's where it has none of its own, and which level."""
    last = stage.levels[-1] if stage.levels else None
    metrics = stage.metrics or (last.metrics if last else {})
    size = stage.size or (last.size if last else {})
    same = [lv.level for lv in stage.levels if lv.metrics == metrics and lv.size.get("kept") == size.get("kept")]
    return metrics, size, same[0] if len(same) == 1 else None


def _row(stage: Stage, named: dict[str, Stage], metrics: dict[tuple[str, str], Metric], dense: float | None) -> Row:
    """One stage's row; ``dense`` is the reference's dense fp32 bytes."""
    own, size, level = _outcome(stage)
    kept, prunable = size.get("kept"), size.get("prunable")
    parent = next(((role, name) for role, (name, _) in _by_role(stage)), None)
    test = own.get(f"test/{stage.monitor[0]}")
    against, base = None, None
    if stage.levels:
        first = _dense(stage)
        against, base = "level 0", first and first.metrics.get(f"test/{stage.monitor[0]}")
    elif (begun := _measured(parent and parent[1], named)) and begun.monitor == stage.monitor:
        against, base = begun.name, _outcome(begun)[0].get(f"test/{stage.monitor[0]}")
    change = None if test is None or base is None else test - base
    smallest = min((e for e in stage.exports if e.bytes is not None), key=_bytes, default=None)
    stored = size.get("checkpoint_bytes") if smallest is None else smallest.bytes
    return Row(
        stage=stage,
        metric=metrics[stage.monitor],
        level=level,
        activation=_activation(stage, named),
        parent=parent,
        parameters=size.get("parameters"),
        kept=kept,
        density=kept / prunable if kept is not None and prunable else None,
        validation=own.get(f"val/{stage.monitor[0]}"),
        test=test,
        against=None if change is None else against,
        change=change,
        bytes=stored,
        form=None if smallest is None else smallest.format,
        smaller=dense / stored if dense and stored else None,
        reproduces=parent[1] if parent and stage.exports and all(e.same_predictions for e in stage.exports) else None,
    )


def _dense_row(row: Row) -> Row:
    """The row; of a hunt, with the figures of its dense level."""
    if (dense := _dense(row.stage)) is None:
        return row
    validation, test = (dense.metrics.get(f"{split}/{row.metric.name}") for split in ("val", "test"))
    return replace(row, level=0, validation=validation, test=test)


def _teaches(role: str) -> bool:
    """Whether it is ``teacher``, or one of several, ``teacher[0]``."""
    return role.partition("[")[0] == "teacher"


def _measured(name: str | None, named: dict[str, Stage]) -> Stage | None:
    """The stage called ``name``; of one that has measured nothing, such as a cache, the one that it came from."""
    seen: set[str] = set()
    while name in named and name not in seen and _aside(named[name]):
        seen.add(name)
        name = next((parent for _, (parent, _) in _by_role(named[name])), None)
    return named.get(name) if name else None


def _by_role(stage: Stage) -> list[tuple[str, tuple[str, str | None]]]:
    """The parents, the teacher first: a student that starts from another network is compared with it."""
    return sorted(stage.parents.items(), key=lambda item: not _teaches(item[0]))


def _activation(stage: Stage, named: dict[str, Stage], seen: tuple[str, ...] = ()) -> str | None:
    """The first "activation" in the arguments, the model's first; else that of the network begun with."""
    for arguments in (stage.arguments.get("model"), stage.arguments):
        if (name := _named_activation(arguments)) is not None:
            return name
    begun = [name for role, (name, _) in stage.parents.items() if not _teaches(role)]
    if len(begun) != 1 or begun[0] not in named or begun[0] in seen:
        return None
    return _activation(named[begun[0]], named, (*seen, stage.name))


def _named_activation(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("activation"), str):
        return value["activation"]
    return next((name for entry in value.values() if (name := _named_activation(entry)) is not None), None)


def _dense(stage: Stage) -> Level | None:
    """The hunt's level 0."""
    return next((level for level in stage.levels if level.level == 0), None)


def _hunt(stage: Stage, measured: Metric) -> Hunt:
    """A hunt's levels compared with level 0; the pick looks at validation data only."""
    name, first = measured.name, _dense(stage)
    base = None if first is None else first.metrics.get(f"test/{name}")
    rows = []
    for level in stage.levels:
        test = level.metrics.get(f"test/{name}")
        change = None if test is None or base is None else test - base
        rows.append(LevelRow(level, level.metrics.get(f"val/{name}"), test, change))
    dense = next((row for row in rows if row.level is first), None)
    near = [r for r in rows if dense and _near(r.validation, dense.validation, measured)]
    near = [r for r in near if r.level.density is not None and r is not dense]
    return Hunt(stage, measured, rows, dense, min(near, key=lambda r: r.level.density or 0, default=None))


def _pick(rows: list[Row], hunts: list[Hunt], reference: Row) -> Pick | None:
    """The smallest checkpoint, the reference aside, that is near the reference on validation data.

    Test figures play no part. An export counts when it was verified to reproduce its source's predictions; a
    hunt's level when its bytes on disk are recorded. Of equally small ones the earliest is taken.
    """
    named = {row.stage.name: row for row in rows}
    found: list[Pick] = []
    for row in rows:
        source = named.get(row.reproduces) if row.reproduces else None
        if source is not None and _near_row(source, reference):
            exports = (e for e in row.stage.exports if e.bytes is not None)
            found += [Pick(row, None, e.format, _bytes(e), source.stage.name, source.test) for e in exports]
        elif row is not reference and row.bytes is not None and not row.stage.exports and _near_row(row, reference):
            found.append(Pick(row, row.level, None, row.bytes, row.stage.name, row.test))
    for hunt in hunts:
        row = named[hunt.stage.name]
        for entry in hunt.levels if _comparable(row, reference) else ():
            stored = entry.level.size.get("checkpoint_bytes")
            if stored is not None and _near(entry.validation, reference.validation, reference.metric):
                found.append(Pick(row, entry.level.level, None, stored, row.stage.name, entry.test))
    smaller = (pick for pick in found if pick.bytes < (dense_bytes(reference) or 0))
    return min(smaller, key=lambda pick: pick.bytes, default=None)


def _comparable(row: Row, reference: Row) -> bool:
    return row.stage.monitor == reference.stage.monitor


def _near_row(row: Row, reference: Row) -> bool:
    return _comparable(row, reference) and _near(row.validation, reference.validation, reference.metric)


def _near(value: float | None, reference: float | None, measured: Metric) -> bool:
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        return False
    return measured.within(value, reference, TOLERANCE)


def _has(entry: dict[str, float], measured: Metric) -> bool:
    return _finite(entry.get("epoch")) and _finite(entry.get(f"val/{measured.name}"))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _bytes(export: Export) -> float:
    return math.inf if export.bytes is None else export.bytes
