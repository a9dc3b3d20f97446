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

from workbench.report import comparisons, tables
from workbench.report import facts as data
from workbench.report import figures as draw
from workbench.report.reading import Stage
from workbench.report.wording import size, times

_UNIT = re.compile(r"(?<=\d) (?=(?:[kMG]?B|points?)\b)")


@dataclass(frozen=True)
class Bought:
    """A comparison's part of the page; ``moved`` is None where its classes are not recorded."""

    stage: str
    about: str
    scores: tables.Table
    moved: tables.Table | None
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


def render(stages: Sequence[Stage], title: str, run: str) -> tuple[str, dict[str, str]]:
    """The page and its figures as files by name, of the stages of the run called ``run``.

    Raises:
        ValueError: If no stage is finished.
    """
    found = data.gather(stages)
    learning, sparsity = data.learning(found), data.sparsity(found)
    told = [stage for stage in found.aside if stage.comparison]
    compared = [name for stage in told if stage.comparison for name in comparisons.names(stage.comparison)]
    colour = draw.colours([*(c.stage for c in (*learning, *sparsity)), *compared])
    bought = _bought(told, colour)
    drawn = [part.figure for part in bought if part.figure]
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
        headline=_UNIT.sub("\N{NO-BREAK SPACE}", tables.headline(found)),
        caveat=tables.caveat(found),
        unfinished=tables.unfinished(found),
        stale=data.stale(stages),
        stages=tables.stages(found),
        legend=tables.legend(found),
        aside=tables.aside(found),
        bought=bought,
        exports=tables.exports(found),
        hunts=[(hunt, tables.sparsest(hunt), tables.levels(hunt)) for hunt in found.hunts],
        figures=figures,
        svg=Markup,
        colour=colour,
        palette=draw.PALETTE,
        versions=_shared([(s.name, s.versions) for s in stages]),
        machines=_shared([(s.name, s.environment) for s in stages]),
        prints=tables.prints(stages),
        recipe=_recipe(stages),
    )
    return page, {name: draw.standalone(svg) for figure in (*drawn, *figures) for name, svg in figure.images.items()}


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
            fingerprint = f"{stage.name} {tables.short(stage.fingerprint)}"
            sample = f"n beside each class, no interval. Recipe fingerprints: {fingerprint}."
            figure = Figure(number, title, comparisons.movement(found, shown), sample, {name: svg})
        moved = comparisons.classes(found, shown) if shown else None
        movement = comparisons.movement(found, shown) if found.classes and not shown else ""
        made.append(Bought(stage.name, comparisons.about(found), comparisons.scores(found), moved, movement, figure))
    return made


def _figures(found: data.Facts, learning: list, sparsity: list, colour: dict[str, int], first: int) -> list[Figure]:
    """The figures that the records have points for, numbered from ``first``; one image per metric."""
    made: list[tuple[str, str, Iterable[str], dict[str, str]]] = []
    if learning:
        images = {
            name: draw.learning(name, tables.axis(curves[0], "validation"), curves, colour)
            for name, curves in _by_metric("learning", learning)
        }
        about = (
            "The main validation metric after each epoch; of a hunt, that of its dense level 0. First epochs "
            "far off the rest are cut by the axis."
        )
        made.append(("Learning", about, [c.stage for c in learning], images))
    if sparsity:
        images = {
            name: draw.sparsity(name, tables.axis(curves[0], "test"), curves, colour)
            for name, curves in _by_metric("density", sparsity)
        }
        about = (
            "The main test metric at each level, densest left; dashed, the same hunt's dense level 0. A "
            "curve shows how far a network can be pruned; that its weights are a winning ticket takes "
            "controls with re-drawn weights and shuffled masks."
        )
        made.append(("Score against density", about, [c.stage for c in sparsity], images))
    images, drawn = _costs(found, colour)
    if images:
        about = "Time spent in each stage, and bytes on disk of what it left; of an export, its smallest format."
        made.append(("Cost and size", about, drawn, images))
    return [
        Figure(number, title, about, tables.sample(found, names), images)
        for number, (title, about, names, images) in enumerate(made, start=first)
    ]


def _costs(found: data.Facts, colour: dict[str, int]) -> tuple[dict[str, str], list[str]]:
    """The two bar charts, and the stages in either."""
    images = {}
    # A family was trained together, and is one bar.
    times_ = {s.family or s.name: s.seconds for s in (*(r.stage for r in found.rows), *found.aside)}
    spent = [(name, value, tables.duration(value)) for name, value in times_.items() if value is not None]
    if spent:
        images["seconds"] = draw.bars("seconds", "time spent", spent, colour, tables.duration)
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
