"""The page: facts, tables and figures put into the template beside this file."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.records import Stage, Verdict
from workbench.report import cells, headline
from workbench.report import figures as draw
from workbench.report import summary as data
from workbench.report.bands import Band
from workbench.report.format import duration, size, times
from workbench.report.sections import comparisons, stages, sweeps, verdicts
from workbench.report.svg import PALETTE, standalone

Drawn = tuple[list[Band], list[Band]]
"""Scores and steps of a group."""
_UNIT = re.compile(r"(?<=\d) (?=(?:[kMG]?B|points?|seeds?)\b)")


@dataclass(frozen=True)
class Bought:
    """A comparison's part of the page; ``moved`` is None where its classes are not recorded."""

    stage: str
    about: str
    scores: cells.Table
    moved: cells.Table | None
    movement: str
    figure: "Figure | None"


@dataclass(frozen=True)
class Figure:
    """A numbered figure: its SVGs by file name, what it shows, and n, interval and fingerprints."""

    number: int
    title: str
    about: str
    sample: str
    images: dict[str, str]


@dataclass(frozen=True)
class Group:
    """What a verdict says of one group of hunts; ``title`` is empty where it is the only one."""

    title: str
    sentence: str
    rest: str
    levels: cells.Table
    legend: str
    figure: "Figure | None"


@dataclass(frozen=True)
class Gaps:
    """What a verdict says of the difference of two groups."""

    title: str
    sentence: str
    levels: cells.Table


@dataclass(frozen=True)
class Ruling:
    """A verdict's part of the page: its groups, and the differences of two."""

    stage: str
    groups: list[Group]
    gaps: list[Gaps]


@dataclass(frozen=True)
class Sweep:
    """A sweep's part of the page; ``means`` is None without seeds."""

    stage: str
    sentence: str
    runs: cells.Table
    means: cells.Table | None
    figure: "Figure | None"


def render(every: Sequence[Stage], title: str, run: str) -> tuple[str, dict[str, str]]:
    """The page and its figures as files by name, of the stages of the run called ``run``.

    Raises:
        ValueError: If no stage is finished.
    """
    found = data.gather(every)
    learning, sparsity = data.learning(found), data.sparsity(found)
    told = [stage for stage in found.aside if stage.comparison]
    compared = [name for stage in told if stage.comparison for name in comparisons.names(stage.comparison)]
    colour = draw.colours([*(c.stage for c in (*learning, *sparsity)), *compared])
    bought = _bought(told, colour)
    drawn = [part.figure for part in bought if part.figure]
    rulings = _rulings(found.verdicts, len(drawn) + 1)
    drawn += [group.figure for part in rulings for group in part.groups if group.figure]
    swept = _sweeps(found, len(drawn) + 1)
    drawn += [part.figure for part in swept if part.figure]
    figures = _figures(found, learning, sparsity, colour, len(drawn) + 1)
    environment = Environment(
        loader=PackageLoader("workbench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        run=shlex.quote(run),
        headline=_UNIT.sub("\N{NO-BREAK SPACE}", headline.headline(found)),
        caveat=headline.caveat(found),
        unfinished=headline.unfinished(found),
        stale=data.stale(every),
        stages=stages.stages(found) if found.rows else None,
        legend=stages.legend(found) if found.rows else "",
        aside=headline.aside(found),
        bought=bought,
        rulings=rulings,
        sweeps=swept,
        exports=stages.exports(found),
        hunts=[(hunt, stages.sparsest(hunt), stages.levels(hunt), stages.columns(hunt)) for hunt in found.hunts],
        figures=figures,
        svg=Markup,
        colour=colour,
        palette=PALETTE,
        versions=_shared([(s.name, s.versions) for s in every]),
        machines=_shared([(s.name, s.environment) for s in every]),
        prints=stages.prints(every),
        recipe=_recipe(every),
    )
    return page, {name: standalone(svg) for figure in (*drawn, *figures) for name, svg in figure.images.items()}


def _bought(stages: Sequence[Stage], colour: dict[str, int]) -> list[Bought]:
    """What each comparison found, with a figure of the classes that move, if any does."""
    made: list[Bought] = []
    number = 0
    for stage in stages:
        found = stage.comparison
        assert found is not None, "the caller has seen to that"
        shown = comparisons.moves(found)
        figure = None
        if shown:
            name = f"classes-{number + 1}" if number else "classes"
            svg = draw.moves(
                name, "change of recall by class", shown, comparisons.names(found), found.baseline or "", colour
            )
            title = f"Classes that move{f', {stage.name}' if len(stages) > 1 else ''}"
            number += 1
            fingerprint = f"{stage.name} {cells.short(stage.fingerprint)}"
            sample = f"n beside each class, no interval. Recipe fingerprints: {fingerprint}."
            figure = Figure(number, title, comparisons.movement(found, shown), sample, {name: svg})
        moved = comparisons.classes(found, shown) if shown else None
        movement = comparisons.movement(found, shown) if found.classes and not shown else ""
        made.append(Bought(stage.name, comparisons.about(found), comparisons.scores(found), moved, movement, figure))
    return made


def _rulings(stages: Sequence[Stage], number: int) -> list[Ruling]:
    """What each verdict says, with a figure a group, numbered from ``number``; groups are drawn to one scale."""
    made: list[Ruling] = []
    place = 0
    for stage in stages:
        groups = []
        drawn = [(verdicts.scores(found), verdicts.steps(found)) for found in stage.verdicts]
        for found, bands in zip(stage.verdicts, drawn):
            figure = None
            if bands[0]:
                figure = _judged(stage, found, bands, drawn, number + place, f"-{place + 1}" if place else "")
                place += 1
            title = verdicts.name(stage, found) if len(stage.verdicts) > 1 else ""
            told = verdicts.sentence(found), verdicts.rest(found), verdicts.levels(found), verdicts.legend(found)
            groups.append(Group(title, *told, figure))
        measured = verdicts.measure(stage.verdicts[0])
        gaps = [
            Gaps(verdicts.pair(g), verdicts.contrast(g, stage.verdicts[0]), verdicts.gaps(g, measured))
            for g in stage.differences
        ]
        made.append(Ruling(stage.name, groups, gaps))
    return made


def _judged(stage: Stage, found: Verdict, bands: Drawn, every: Sequence[Drawn], number: int, suffix: str) -> Figure:
    """Scores of tickets and controls against density, and beside them how soon they were best."""
    (scores, steps), measured, split = bands, verdicts.measure(found), found.metric.partition("/")[0]
    said = f"{split} {measured.name}, {measured.direction}"
    limits = draw.reach([band for each, _ in every for band in each], [each[0] for each, _ in every if each])
    images = {f"tickets{suffix}": draw.over_seeds(f"tickets{suffix}", said, scores, measured, limits)}
    about = (
        f"Mean {split} {measured.name} over seeds against density, densest left; shaded, its interval; dashed, the "
        "dense level 0; ringed, levels judged tickets."
    )
    if steps:
        said, shown = "step of the lowest validation loss, lower learns sooner", [b for _, each in every for b in each]
        images[f"steps{suffix}"] = draw.over_seeds(f"steps{suffix}", said, steps, None, draw.reach(shown, shown))
        about += " Second, the early-stopping iteration: the step of the lowest validation loss."
    about += " What lies far off the tickets is cut by the axis."
    title = f"Score against density, {verdicts.name(stage, found)}"
    return Figure(number, title, about, verdicts.caption(stage, found), images)


def _sweeps(found: data.Facts, number: int) -> list[Sweep]:
    """What the runs of each sweep came to; hunts that no verdict tells of are drawn, numbered from ``number``."""
    made: list[Sweep] = []
    place = 0
    for stage in found.sweeps:
        figure = None
        if told := None if stage.name in found.covered else sweeps.curves(stage):
            measured, bands = told
            name = f"sweep-{place + 1}" if place else "sweep"
            svg = draw.over_seeds(
                name, f"test {measured.name}, {measured.direction}", bands, measured, draw.reach(bands, bands)
            )
            about = (
                f"Mean test {measured.name} over seeds against density, densest left; shaded, its interval; dashed, "
                "the dense level 0. What lies far off the rest is cut by the axis."
            )
            title = f"Score against density, {stage.name}"
            figure = Figure(number + place, title, about, sweeps.caption(stage), {name: svg})
            place += 1
        made.append(Sweep(stage.name, sweeps.sentence(stage), sweeps.runs(stage), sweeps.means(stage), figure))
    return made


def _figures(found: data.Facts, learning: list, sparsity: list, colour: dict[str, int], first: int) -> list[Figure]:
    """The figures that the records have points for, numbered from ``first``; one image per metric."""
    made: list[tuple[str, str, Iterable[str], dict[str, str]]] = []
    if learning:
        images = {
            name: draw.learning(name, stages.axis(curves[0], "validation"), curves, colour)
            for name, curves in _by_metric("learning", learning)
        }
        about = (
            "The main validation metric after each epoch; of a hunt, that of its dense level 0. First epochs "
            "far off the rest are cut by the axis."
        )
        made.append(("Learning", about, [c.stage for c in learning], images))
    if sparsity:
        images = {
            name: draw.sparsity(name, stages.axis(curves[0], "test"), curves, colour)
            for name, curves in _by_metric("density", sparsity)
        }
        about = (
            "The main test metric at each level, densest left; dashed, the same hunt's dense level 0. A "
            "curve shows how far a network can be pruned; that its weights are a winning ticket takes "
            "controls with re-drawn weights and shuffled masks."
        )
        if any(curve.controls for curve in sparsity):
            about += " Thin, its controls."
        made.append(("Score against density", about, [c.stage for c in sparsity], images))
    images, drawn = _costs(found, colour)
    if images:
        about = "Time spent in each stage, and bytes on disk of what it left; of an export, its smallest format."
        made.append(("Cost and size", about, drawn, images))
    return [
        Figure(number, title, about, stages.sample(found, names), images)
        for number, (title, about, names, images) in enumerate(made, start=first)
    ]


def _costs(found: data.Facts, colour: dict[str, int]) -> tuple[dict[str, str], list[str]]:
    """The two bar charts, and the stages in either."""
    images = {}
    # A family was trained together, and is one bar.
    times_ = {s.family or s.name: s.seconds for s in (*(r.stage for r in found.rows), *found.aside)}
    spent = [(name, value, duration(value)) for name, value in times_.items() if value is not None]
    if spent:
        images["seconds"] = draw.bars("seconds", "time spent", spent, colour, duration)
    stored = [
        (r.stage.name, r.bytes, f"{size(r.bytes)}, {times(r.smaller)}" if r.smaller else size(r.bytes))
        for r in found.rows
        if r.bytes is not None
    ]
    if stored:
        dense = data.dense_bytes(found.reference) if found.reference else None
        line = (
            (dense, f"{found.reference.stage.name} in dense fp32, {size(dense)}") if found.reference and dense else None
        )
        images["bytes"] = draw.bars("bytes", "bytes on disk", stored, colour, size, line)
    return images, list(dict.fromkeys(name for name, _, _ in (*spent, *stored)))


def _by_metric(name: str, curves: list[data.Curve]) -> list[tuple[str, list[data.Curve]]]:
    """The curves in groups of one metric each, with a file name per group."""
    groups: dict[Any, list[data.Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.metric, []).append(curve)
    return [(name if i == 0 else f"{name}-{i + 1}", group) for i, group in enumerate(groups.values())]


def _shared(entries: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Mappings that several stages share, told once: whose they are, then the pairs of key and value."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, mapping in entries:
        if mapping:
            groups.setdefault(json.dumps(mapping, sort_keys=True), ([], mapping))[0].append(name)
    return [
        (
            "every stage" if len(names) == len(entries) else ", ".join(names),
            [(k, str(v)) for k, v in shared.items()],
        )
        for names, shared in groups.values()
    ]


def _recipe(stages: Sequence[Stage]) -> str:
    """The resolved arguments of every stage in the shape of a recipe; empty where none are recorded."""
    if not any(stage.arguments for stage in stages):
        return ""
    recipe = {s.name: {**({"job": s.job} if s.job else {}), **s.arguments} for s in stages}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
