"""What a report shows of job ``sweep``: its sentence, tables of runs and means, and curves of hunts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench import yaml_io
from workbench.evaluation import statistics
from workbench.messages import printable
from workbench.records import SEEDS, Estimate, HuntResult, Level, Run, Stage, SweepResult, read_stage
from workbench.report.bands import Band, band, sample, spread
from workbench.report.blocks import Chapter, Figure, Gallery, Grid, Part, Text
from workbench.report.cells import Cell, Line, Table, seconds, short, without_empty
from workbench.report.format import DASH, Metric, count, duration, metric, plural
from workbench.report.section import Section, Summary

MOST = 8
"""Settings drawn in one figure; more are left to the table."""
NAMED = 5
"""Failed runs named in a sentence."""
_LONGEST = 160


def runs_of(stage: Stage) -> list[Run]:
    """The runs in the stage's record, each with a name, and its values in words."""
    runs = stage.result.runs if isinstance(stage.result, SweepResult) else []
    return [replace(run, name=run.name or f"run {place}", over=_words(run.over)) for place, run in enumerate(runs)]


def levels_of(stage: Stage) -> dict[str, list[Level]]:
    """Of the runs that are finished hunts, by name, the levels that are in their own records.

    Raises:
        ValueError: If a run's record is malformed; names the file.
    """
    levels: dict[str, list[Level]] = {}
    for run in runs_of(stage):
        # A folder's name, never a path: a record is no reason to read anywhere else.
        inside = run.folder if run.folder and run.folder != ".." and Path(run.folder).name == run.folder else None
        if inside is None or run.status != "finished" or run.fingerprint is None:
            continue
        own = read_stage(stage.folder / inside)
        if own is not None and own.fingerprint == run.fingerprint and isinstance(own.result, HuntResult):
            levels[run.name or ""] = own.result.levels
    return {name: run_levels for name, run_levels in levels.items() if run_levels}


def sentence(stage: Stage) -> str:
    """How many runs finished, and which failed, why."""
    every = runs_of(stage)
    failed = [run for run in every if run.status != "finished"]
    text = f"{len(every) - len(failed)} of {plural(len(every), 'run')} finished"
    if not failed:
        return f"{text}."
    reasons = "; ".join(f"{run.name} ({_cut(run.error or run.status)})" for run in failed[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return f"{text}. Not finished: {reasons}{more}."


def sentences(stages: Sequence[Stage]) -> list[str]:
    """One for every sweep."""
    return [f"{stage.name}: {sentence(stage)}" for stage in stages]


def chapters(stages: Sequence[Stage], summary: Summary) -> list[Chapter]:
    """One, with a part for each sweep; hunts that no other section covers are drawn."""
    parts = []
    drawn = 0
    for stage in stages:
        blocks: list[Text | Grid | Gallery] = [Text(sentence(stage))]
        levels = {} if stage.name in summary.covered else levels_of(stage)
        if (series := curves(stage, levels)) is not None:
            drawn += 1
            blocks.append(Gallery([_figure(stage, levels, *series, f"sweep-{drawn}" if drawn > 1 else "sweep")]))
        if (table := means(stage)) is not None:
            blocks.append(Grid(table, "means", "Means over seeds, with half their t intervals"))
        table = runs(stage)
        blocks.append(Grid(table, "runs", fold=f"All {len(table.lines)} runs" if len(table.lines) > 20 else ""))
        parts.append(Part(blocks, stage.name))
    return [Chapter("Sweeps", parts)]


def _figure(stage: Stage, levels: Mapping[str, list[Level]], measured: Metric, bands: list[Band], name: str) -> Figure:
    from workbench.report import figures  # matplotlib takes seconds to import, and a terminal shows no figure

    title, limits = f"test {measured.name}, {measured.direction}", figures.reach(bands, bands)
    about = (
        f"Mean test {measured.name} over seeds against density, densest left; shaded, its interval; dashed, "
        "the dense level 0. The axis cuts outliers off."
    )
    images = {name: figures.over_seeds(name, title, bands, measured, limits)}
    return Figure(f"Score against density, {stage.name}", about, caption(stage, levels), images)


def runs(stage: Stage) -> Table:
    """One line per run, failed ones with the reason."""
    measured, every = _metrics(stage), runs_of(stage)
    first = next((measured[run.monitor] for run in every if run.monitor in measured), None)
    alike = len(measured) <= 1
    keys = dict.fromkeys(key for run in every for key in run.over)
    columns: list[tuple[str, bool, Callable[[Run], Cell]]] = [
        ("run", False, lambda r: Cell(r.name or "")),
        *((label, False, lambda r, key=key: Cell(r.over.get(key, DASH))) for key, label in _labels(keys).items()),
        ("status", False, lambda r: Cell(r.status)),
        (f"test {first.name}" if alike and first else "test", True, lambda r: _test(r, measured, alike)),
        ("took", True, lambda r: Cell(duration(r.seconds), title=seconds(r.seconds))),
        ("attempts", True, lambda r: Cell(count(r.attempts) if r.attempts else DASH)),
        ("fingerprint", False, lambda r: Cell(short(r.fingerprint), title=r.fingerprint or "")),
        ("why", False, lambda r: Cell(_cut(r.error or "") or DASH, title=r.error or "")),
    ]
    lines = [Line([cell(run) for _, _, cell in columns], marked=run.status != "finished") for run in every]
    return without_empty(Table([c[0] for c in columns], [c[1] for c in columns], lines))


def means(stage: Stage) -> Table | None:
    """One line per setting, the mean over its seeds; None without seeds, or with a metric of several kinds."""
    measured = _metrics(stage)
    over_seeds = stage.result.summary if isinstance(stage.result, SweepResult) else []
    if not over_seeds or len(measured) != 1:
        return None
    (shown,) = measured.values()
    rows = [replace(row, over=_words(row.over)) for row in over_seeds]
    keys = dict.fromkeys(key for row in rows for key in row.over)
    lines = [
        Line(
            [
                *([Cell(row.over.get(key, DASH)) for key in keys] or [Cell("all runs")]),
                Cell(count(row.n)),
                *(Cell(spread(row.metrics.get(f"{split}/{shown.name}"), shown)) for split in ("val", "test")),
            ]
        )
        for row in rows
    ]
    headers = [*(_labels(keys).values() or ["setting"]), "seeds", f"val {shown.name}", f"test {shown.name}"]
    return without_empty(Table(headers, [*[False] * (len(headers) - 3), True, True, True], lines))


def settings(stage: Stage, levels: Mapping[str, list[Level]]) -> dict[str, list[Run]]:
    """The runs whose ``levels`` are known, by what they are beside their seed."""
    groups: dict[str, list[Run]] = {}
    every = runs_of(stage)
    keys = dict.fromkeys(key for run in every for key in run.over if key not in SEEDS)
    labels = _labels(keys)
    for run in every:
        if run.name in levels:
            setting = ", ".join(f"{labels[key]} {run.over[key]}" for key in keys if key in run.over)
            groups.setdefault(setting or stage.name, []).append(run)
    return groups


def curves(stage: Stage, levels: Mapping[str, list[Level]]) -> tuple[Metric, list[Band]] | None:
    """The mean test metric over seeds against density, one curve a setting; None if there is nothing to draw.

    A level counts where every run of its setting has it.
    """
    groups = settings(stage, levels)
    monitors = {run.monitor for group in groups.values() for run in group}
    if len(monitors) != 1 or len(groups) > MOST:
        return None
    (monitor,) = monitors
    key = f"test/{monitor[0]}"
    values = [level.metrics.get(key) for group in groups.values() for run in group for level in levels[run.name or ""]]
    bands = []
    for tone, (name, group) in enumerate(groups.items()):
        points = _points([levels[run.name or ""] for run in group], key)
        dense = next((estimate.mean for density, estimate in points if density == 1), None)
        bands.append(band(name, tone, ((density, estimate, False) for density, estimate in points), dense))
    drawn = [each for each in bands if each]
    return (metric(*monitor, values), drawn) if drawn else None


def caption(stage: Stage, levels: Mapping[str, list[Level]]) -> str:
    """n, the interval's kind, and fingerprints."""
    groups = settings(stage, levels)
    drawn = [run for group in groups.values() for run in group]
    key = f"test/{drawn[0].monitor[0]}" if drawn else ""
    points = [_points([levels[run.name or ""] for run in group], key) for group in groups.values()]
    seeds = {run.over[key] for run in drawn for key in SEEDS if key in run.over}
    listed = ", ".join(f"{run.name} {short(run.fingerprint)}" for run in drawn)
    estimates = [estimate for each in points for _, estimate in each]
    text = sample([len(group) for group in groups.values()], sorted(seeds, key=lambda s: (len(s), s)), estimates)
    return f"{text}. Recipe fingerprints: {listed}."


def _points(hunts: list[list[Level]], key: str) -> list[tuple[float, Estimate]]:
    """Density and mean over hunts of every level that all of them have."""
    scores = [
        {round(level.density, 6): level.metrics[key] for level in levels if level.density and key in level.metrics}
        for levels in hunts
    ]
    shared = [density for density in scores[0] if all(density in each for each in scores)]
    values = {density: [each[density] for each in scores] for density in shared}
    return [(density, statistics.mean(v)) for density, v in values.items() if all(map(math.isfinite, v))]


def _metrics(stage: Stage) -> dict[tuple[str, str], Metric]:
    """One metric per monitor of the runs that measured something."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for run in runs_of(stage):
        if run.metrics:
            recorded = [run.metrics.get(f"{split}/{run.monitor[0]}") for split in ("val", "test")]
            values.setdefault(run.monitor, []).extend(recorded)
    return {monitor: metric(*monitor, recorded) for monitor, recorded in values.items()}


def _test(run: Run, measured: dict[tuple[str, str], Metric], alike: bool) -> Cell:
    shown, value = measured.get(run.monitor), run.metrics.get(f"test/{run.monitor[0]}")
    if shown is None or value is None:
        return Cell(DASH)
    return Cell(shown.show(value), "" if alike else shown.name, str(value))


def _words(over: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value in words."""
    return {key: printable(yaml_io.inline(value)) for key, value in over.items()}


def _labels(keys: dict[str, None]) -> dict[str, str]:
    """Each key by its last part, or in full where two have the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last)}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


SECTION = Section(
    order=30,
    shows=lambda stage: bool(runs_of(stage)),
    unfinished="Not finished, but for some runs",
    over_seeds=True,
    runs=lambda stage: {run.name or "": run.fingerprint for run in runs_of(stage)},
    headline=lambda stages: " ".join(sentences(stages)),
    table=lambda stages: runs(stages[0]),
    sentences=sentences,
    chapters=chapters,
)
"""What job ``sweep`` brings to a report."""
