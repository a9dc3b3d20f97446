"""The page: texts, tables and figures put into the template beside this file."""

import json
import re
import shlex
from collections.abc import Sequence
from itertools import count
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.records import Stage
from workbench.report import figures as draw
from workbench.report import headline, tables
from workbench.report.blocks import Chapter, Figure, Gallery, Grid, Part
from workbench.report.format import duration, size, times
from workbench.report.section import FIGURES, Summary
from workbench.report.summary import gather, learning, stale
from workbench.report.svg import PALETTE, standalone

# A number and its unit stay on one line.
_UNIT = re.compile(r"(?<=\d) (?=(?:[kMG]?B|points?|seeds?)\b)")


def render(stages: Sequence[Stage], title: str, run: str) -> tuple[str, dict[str, str]]:
    """The page and its figures as files by name, of the stages of the run called ``run``.

    Raises:
        ValueError: If no stage is finished, or a section cannot be imported.
    """
    summary = gather(stages)
    chapters = _chapters(summary)
    environment = Environment(
        loader=PackageLoader("workbench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    number = count(1)
    page = environment.get_template("page.html.j2").render(
        title=title,
        run=shlex.quote(run),
        headline=_UNIT.sub("\N{NO-BREAK SPACE}", headline.headline(summary)),
        caveat=headline.caveat(summary),
        unfinished=headline.unfinished(summary),
        stale=stale(stages),
        stages=Grid(tables.main(summary), "stages") if summary.rows else None,
        legend=tables.legend(summary) if summary.rows else "",
        others=headline.others(summary),
        chapters=chapters,
        kind=lambda block: type(block).__name__,
        number=lambda: next(number),
        svg=Markup,
        colours=summary.colours,
        palette=PALETTE,
        versions=_shared([(s.name, s.versions) for s in stages]),
        machines=_shared([(s.name, s.environment) for s in stages]),
        provenance=Grid(tables.provenance(stages), "prints"),
        recipe=_recipe(stages),
    )
    images = [image for chapter in chapters for figure in chapter.figures for image in figure.images.items()]
    return page, {name: standalone(svg) for name, svg in images}


def _chapters(summary: Summary) -> list[Chapter]:
    """Those of the sections, and between them the figures of all stages."""
    chapters = [
        (section.order, chapter)
        for section, stages in summary.sections
        if section.chapters
        for chapter in section.chapters(stages, summary)
    ]
    if figures := _figures(summary):
        chapters.append((FIGURES, Chapter("Figures", [Part([Gallery(figures)])])))
    return [chapter for _, chapter in sorted(chapters, key=lambda pair: pair[0])]


def _figures(summary: Summary) -> list[Figure]:
    """Learning curves, figures of sections, and what the stages cost; one image per metric."""
    figures = []
    if curves := learning(summary):
        images = {
            name: draw.learning(name, tables.axis(group[0].metric, "validation"), group, summary.colours)
            for name, group in draw.by_metric("learning", curves)
        }
        about = (
            "The main validation metric after each epoch; of a hunt, that of its dense level 0. First epochs "
            "far off the rest are cut by the axis."
        )
        figures.append(Figure("Learning", about, tables.sample(summary, [c.stage for c in curves]), images))
    for section, stages in summary.sections:
        figures += section.figures(stages, summary)
    images, drawn = _costs(summary)
    if images:
        about = "Time spent in each stage, and bytes on disk of what it left; of an export, its smallest format."
        figures.append(Figure("Cost and size", about, tables.sample(summary, drawn), images))
    return figures


def _costs(summary: Summary) -> tuple[dict[str, str], list[str]]:
    """The two bar charts, and the stages in either."""
    images = {}
    # A family was trained together, and is one bar.
    every = (*(row.stage for row in summary.rows), *summary.others)
    spent = {stage.family or stage.name: stage.spent for stage in every}
    spent = [(name, value, duration(value)) for name, value in spent.items() if value is not None]
    if spent:
        images["seconds"] = draw.bars("seconds", "time spent", spent, summary.colours, duration)
    stored = [
        (row.stage.name, value, f"{size(value)}, {times(row.smaller)}" if row.smaller else size(value))
        for row in summary.rows
        if (value := row.stored.bytes) is not None
    ]
    if stored:
        reference = summary.reference
        dense = reference.dense_bytes if reference else None
        line = (dense, f"{reference.stage.name} in dense fp32, {size(dense)}") if reference and dense else None
        images["bytes"] = draw.bars("bytes", "bytes on disk", stored, summary.colours, size, line)
    return images, list(dict.fromkeys(name for name, _, _ in (*spent, *stored)))


def _shared(entries: Sequence[tuple[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Mappings that several stages share, once each: whose they are, then the pairs of key and value."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, mapping in entries:
        if mapping:
            groups.setdefault(json.dumps(mapping, sort_keys=True), ([], mapping))[0].append(name)
    return [
        ("every stage" if len(names) == len(entries) else ", ".join(names), [(k, str(v)) for k, v in shared.items()])
        for names, shared in groups.values()
    ]


def _recipe(stages: Sequence[Stage]) -> str:
    """The resolved arguments of every stage in the shape of a recipe; empty where none are recorded."""
    if not any(stage.arguments for stage in stages):
        return ""
    recipe = {s.name: {**({"job": s.job} if s.job else {}), **s.arguments} for s in stages}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
