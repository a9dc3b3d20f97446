"""From stages to the content of a report: rows, learning curves and the pick. Pure functions of records."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from workbench.records import Size, Stage, expand
from workbench.report.format import Metric, metric
from workbench.report.rows import Checkpoint, Outcome, Pick, Row
from workbench.report.section import Section, Summary, sections_of

TOLERANCE = 0.01
"""How much worse than the reference a pick may be on validation data: one point of a share, else 1%."""


@dataclass(frozen=True)
class Curve:
    """Points of one stage to draw."""

    stage: str
    metric: Metric
    x: list[float]
    y: list[float]


def gather(stages: Sequence[Stage]) -> Summary:
    """What the stages of a run, in their order, say; finished reports measure nothing, so are left out.

    Raises:
        ValueError: If no stage is finished, or a section cannot be imported.
    """
    every = [s for s in expand(stages) if not (s.job == "report" and s.finished)]
    sections = sections_of(s.job for s in every)
    shown = [(each, [s for s in every if s.job == job and each.shows(s)]) for job, each in sections.items()]
    shown = [(section, of_job) for section, of_job in shown if of_job]
    finished, unfinished = [s for s in every if s.finished], [s for s in every if not s.finished]
    if not finished and not shown:
        listed = ", ".join(f"{s.name}: {s.status}" for s in unfinished) or "nothing but reports"
        raise ValueError(
            f"no finished stage to report on ({listed}): run the recipe again, it resumes where it stopped"
        )
    outcomes = {s.name: outcome for s in finished if (outcome := _outcome(s, sections)) is not None}
    if not outcomes and not any(section.headline(of_job) for section, of_job in shown):
        outcomes = {s.name: Outcome(s.metrics, s.size or Size()) for s in finished}
    measured = [s for s in finished if s.name in outcomes]
    metrics = _metrics(measured, outcomes)
    sized = [s for s in measured if outcomes[s.name].size.dense_fp32_bytes]
    teachers = {parent for s in finished for parent in teachers_of(s)}
    reference = next((s for s in sized if s.name in teachers), sized[0] if sized else None)
    dense = None if reference is None else outcomes[reference.name].size.dense_fp32_bytes
    named = {s.name: s for s in finished}
    rows = [_row(s, named, outcomes, metrics, dense, sections) for s in measured]
    first = next((_dense_row(row) for row in rows if reference is not None and row.stage is reference), None)
    covered = {name for section, of_job in shown for s in of_job if s.finished for name in section.covers(s)}
    others = [s for s in finished if s.name not in outcomes]
    summary = Summary(rows, others, unfinished, first, None, shown, covered, metrics)
    names = [curve.stage for curve in learning(summary)]
    names += [name for section, of_job in shown for name in section.colours(of_job)]
    colours = {name: number % 8 for number, name in enumerate(dict.fromkeys(names))}
    return replace(summary, pick=None if first is None else _pick(rows, first), colours=colours)


def teachers_of(stage: Stage) -> list[str]:
    """The stages that taught it."""
    return [name for role, (name, _) in stage.parents.items() if _teaches(role)]


def stale(stages: Iterable[Stage]) -> list[tuple[str, str]]:
    """Pairs of a stage and a parent that has been run anew, with other arguments, after the stage."""
    stages = list(stages)
    now = {s.name: s.fingerprint for s in (*stages, *expand(stages))}
    sections = sections_of(s.job for s in stages)
    for stage in stages:
        if section := sections.get(stage.job or ""):
            now |= {f"{stage.name}/{name}": fingerprint for name, fingerprint in section.runs(stage).items()}
    return [
        (s.name, parent)
        for s in stages
        for parent, fingerprint in s.parents.values()
        if fingerprint and now.get(parent) and now[parent] != fingerprint
    ]


def learning(summary: Summary) -> list[Curve]:
    """The main validation metric after each epoch, one curve a stage."""
    curves = []
    for row in summary.rows:
        key = f"val/{row.metric.name}"
        entries = [e for e in row.outcome.history if _finite(e.get("epoch")) and _finite(e.get(key))]
        if points := sorted((entry["epoch"] + 1, entry[key]) for entry in entries):
            curves.append(Curve(row.stage.name, row.metric, [x for x, _ in points], [y for _, y in points]))
    return curves


def near(value: float | None, reference: float | None, measured: Metric) -> bool:
    """Whether a validation score is within the tolerance of the reference's."""
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        return False
    return measured.within(value, reference, TOLERANCE)


def _outcome(stage: Stage, sections: Mapping[str, Section]) -> Outcome | None:
    """The content of the stage's row; None if it has none, as a stage that measured no network."""
    section = sections.get(stage.job or "")
    if section is not None and section.outcome is not None and section.shows(stage):
        return section.outcome(stage)
    size = stage.size or Size()
    if stage.job is None or stage.metrics or stage.history or size != Size():
        return Outcome(stage.metrics, size, stage.history)
    return None


def _metrics(stages: Iterable[Stage], outcomes: Mapping[str, Outcome]) -> dict[tuple[str, str], Metric]:
    """One metric per monitor; whether it is a share is decided by all its values in the run."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for stage in stages:
        for recorded in (stage.metrics, *outcomes[stage.name].measured):
            for split in ("val", "test"):
                values.setdefault(stage.monitor, []).append(recorded.get(f"{split}/{stage.monitor[0]}"))
    return {monitor: metric(*monitor, numbers) for monitor, numbers in values.items()}


def _row(
    stage: Stage,
    named: Mapping[str, Stage],
    outcomes: Mapping[str, Outcome],
    metrics: Mapping[tuple[str, str], Metric],
    dense: float | None,
    sections: Mapping[str, Section],
) -> Row:
    """One stage's row; ``dense`` is the reference's dense fp32 bytes."""
    outcome, section = outcomes[stage.name], sections.get(stage.job or "")
    key = f"test/{stage.monitor[0]}"
    parent = next(((role, name) for role, (name, _) in _by_role(stage)), None)
    test = outcome.metrics.get(key)
    against, base = None, None
    if (compared := outcome.compared or outcome.dense) is not None:
        against, base = compared[0], compared[1].get(key)
    elif (begun := _measured(parent and parent[1], named, outcomes)) and begun.monitor == stage.monitor:
        against, base = begun.name, outcomes[begun.name].metrics.get(key) if begun.name in outcomes else None
    change = None if test is None or base is None else test - base
    stored = outcome.stored or Checkpoint(outcome.size.checkpoint_bytes, metrics=outcome.metrics)
    return Row(
        stage=stage,
        outcome=outcome,
        metric=metrics[stage.monitor],
        activation=_activation(stage, named),
        parent=parent,
        validation=outcome.metrics.get(f"val/{stage.monitor[0]}"),
        test=test,
        against=None if change is None else against,
        change=change,
        stored=stored,
        smaller=dense / stored.bytes if dense and stored.bytes else None,
        reproduces=parent[1] if parent and outcome.verified else None,
        seeded=section is None or section.seeded,
    )


def _dense_row(row: Row) -> Row:
    """The row, with the figures of the stage's own dense network where it has one."""
    if row.outcome.dense is None or not row.outcome.dense[1]:
        return row
    validation, test = (row.outcome.dense[1].get(f"{split}/{row.metric.name}") for split in ("val", "test"))
    return replace(row, validation=validation, test=test, is_dense=True)


def _teaches(role: str) -> bool:
    """Whether it is ``teacher``, or one of several, ``teacher[0]``."""
    return role.partition("[")[0] == "teacher"


def _measured(name: str | None, named: Mapping[str, Stage], outcomes: Mapping[str, Outcome]) -> Stage | None:
    """The stage called ``name``; of one that has measured nothing, such as a cache, the one that it came from."""
    visited: set[str] = set()
    while name is not None and name in named and name not in visited and name not in outcomes:
        visited.add(name)
        name = next((parent for _, (parent, _) in _by_role(named[name])), None)
    return named.get(name) if name else None


def _by_role(stage: Stage) -> list[tuple[str, tuple[str, str | None]]]:
    """The parents, the teacher first: a student that starts from another network is compared with it."""
    return sorted(stage.parents.items(), key=lambda item: not _teaches(item[0]))


def _activation(stage: Stage, named: Mapping[str, Stage], visited: tuple[str, ...] = ()) -> str | None:
    """The first "activation" in the arguments, the model's first; else that of the network begun with."""
    for arguments in (stage.arguments.get("model"), stage.arguments):
        if (name := _named_activation(arguments)) is not None:
            return name
    begun = [name for role, (name, _) in stage.parents.items() if not _teaches(role)]
    if len(begun) != 1 or begun[0] not in named or begun[0] in visited:
        return None
    return _activation(named[begun[0]], named, (*visited, stage.name))


def _named_activation(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("activation"), str):
        return value["activation"]
    return next((name for entry in value.values() if (name := _named_activation(entry)) is not None), None)


def _pick(rows: list[Row], reference: Row) -> Pick | None:
    """The smallest checkpoint, the reference's own aside, that is near the reference on validation data.

    Test figures are not used. Ties go to the earliest.
    """
    named = {row.stage.name: row for row in rows}
    picks: list[Pick] = []
    for row in rows:
        choices = row.outcome.checkpoints
        for each in [row.stored] if choices is None else choices:
            source = row if each.metrics is not None else named.get(row.reproduces or "")
            if each.bytes is None or source is None or (row is reference and choices is None):
                continue
            name = source.metric.name
            validation, test = (
                (source.validation, source.test)
                if each.metrics is None
                else (each.metrics.get(f"val/{name}"), each.metrics.get(f"test/{name}"))
            )
            if source.stage.monitor == reference.stage.monitor and near(
                validation, reference.validation, reference.metric
            ):
                picks.append(Pick(row, each, each.bytes, source.stage.name, test))
    smaller = (pick for pick in picks if pick.bytes < (reference.dense_bytes or 0))
    return min(smaller, key=lambda pick: pick.bytes, default=None)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
