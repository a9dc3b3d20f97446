"""Curves and bars into SVG that follows the reader's colour scheme.

Matplotlib lays the figure out in the light palette; afterwards each colour of the palette becomes a CSS
variable with that colour as its fallback, fonts are left to the page, identifiers get the figure's name as a
prefix, and namespaces and metadata go: the same records give the same bytes, and a figure refers to nothing.
"""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from workbench.report.comparisons import Move
from workbench.report.facts import Curve
from workbench.report.wording import Metric, percent

# name: (on white, on near-black). The first eight tell stages apart and stay apart for colour-blind readers.
PALETTE = {
    "series-0": ("#1f5fa8", "#7db0ee"),
    "series-1": ("#bf4408", "#f98f57"),
    "series-2": ("#0d7268", "#4ecfb6"),
    "series-3": ("#7b3ba6", "#c798f3"),
    "series-4": ("#8a6208", "#e2ba54"),
    "series-5": ("#ad2569", "#f180b3"),
    "series-6": ("#3f7a12", "#9fd152"),
    "series-7": ("#4a5868", "#aab8cc"),
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#5a6370", "#a2abb7"),
    "grid": ("#dde1e7", "#353c46"),
}
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLE = {light: f"var(--{name}, {light})" for name, light in _LIGHT.items()}
_MARKERS = "osD^vPXp"
_STYLE: Any = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _LIGHT["ink"],
    "axes.edgecolor": _LIGHT["muted"],
    "axes.labelcolor": _LIGHT["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": _LIGHT["muted"],
    "grid.color": _LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "ytick.left": False,
    "lines.linewidth": 1.8,
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def colours(stages: Sequence[str]) -> dict[str, int]:
    """A number per stage that draws a line; it is the stage's colour and marker in every figure."""
    return {stage: index % len(_MARKERS) for index, stage in enumerate(dict.fromkeys(stages))}


def learning(name: str, title: str, curves: Sequence[Curve], colour: Mapping[str, int]) -> str:
    """The metric after each epoch as SVG, each curve labelled at its end."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(curve.x, curve.y, **_line(colour[curve.stage]), markersize=3.5 if len(curve.x) < 40 else 0)
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_ylim(window([c.y for c in curves]))
        _value_axis(axes, curves[0].metric)
        _label(axes, [(_cut(c.stage), c.x[-1], c.y[-1], colour[c.stage]) for c in curves])

    return _svg(name, title, (5.6, max(3.2, 1.2 + 0.24 * len(curves))), draw)


def sparsity(name: str, title: str, curves: Sequence[Curve], colour: Mapping[str, int]) -> str:
    """The metric against density as SVG, densest left, with each hunt's dense level as a dashed line."""

    def draw(axes: Axes) -> None:
        labels = []
        axes.set_xscale("log")
        low, high = min(min(c.x) for c in curves), max(max(c.x) for c in curves)
        axes.set_xlim(high * 1.08, low / 1.08)
        for curve in curves:
            axes.plot(curve.x, curve.y, **_line(colour[curve.stage]), markersize=5)
            labels.append((_cut(curve.stage), curve.x[-1], curve.y[-1], colour[curve.stage]))
            if curve.dense is not None:
                axes.axhline(curve.dense, color=_LIGHT[f"series-{colour[curve.stage]}"], lw=1, ls=(0, (5, 4)))
                labels.append((f"{_cut(curve.stage, 15)}, dense", low / 1.08, curve.dense, colour[curve.stage]))
        axes.set_xlabel("density: kept / prunable weights")
        axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        _value_axis(axes, curves[0].metric)
        _label(axes, labels)

    return _svg(name, title, (5.6, max(3.2, 1.2 + 0.48 * len(curves))), draw)


def bars(
    name: str,
    title: str,
    entries: Sequence[tuple[str, float, str]],
    colour: Mapping[str, int],
    show: Callable[[float], str],
    line: tuple[float, str] | None = None,
) -> str:
    """Horizontal bars as SVG, first on top: (stage, value, text at its end), and a dashed line if given."""

    def draw(axes: Axes) -> None:
        longest = max([value for _, value, _ in entries] + ([line[0]] if line else [])) or 1.0
        for place, (stage, value, text) in enumerate(entries):
            tone = _LIGHT[f"series-{colour[stage]}" if stage in colour else "muted"]
            axes.barh(place, value, height=0.56, color=tone, linewidth=0)
            axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", size=9)
        if line:
            axes.axvline(line[0], color=_LIGHT["muted"], lw=1, ls=(0, (5, 4)))
            axes.annotate(
                line[1], (line[0], 1), (-3, 2), ("data", "axes fraction"), "offset points",
                ha="right", va="bottom", size=9, color=_LIGHT["muted"],
            )  # fmt: skip
        axes.set_yticks(range(len(entries)), [_cut(stage) for stage, _, _ in entries], color=_LIGHT["ink"])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.grid(visible=False, axis="y")

    return _svg(name, title, (5.6, 0.9 + 0.32 * len(entries)), draw)


def moves(
    name: str, title: str, shown: Sequence[Move], students: Sequence[str], baseline: str, colour: Mapping[str, int]
) -> str:
    """Each student's change of recall by class as SVG, one row a class and one marker a student, the baseline at 0."""
    lane = 0.64 / len(students)
    lines = (len(students) + 2) // 3

    def draw(axes: Axes) -> None:
        for row in range(1, len(shown)):
            axes.axhline(row - 0.5, color=_LIGHT["grid"], lw=0.8)
        for place, student in enumerate(students):
            x = [100 * move.changes[place] for move in shown]
            y = [row + lane * (place - (len(students) - 1) / 2) for row in range(len(shown))]
            tone = _LIGHT[f"series-{colour[student]}"]
            axes.hlines(y, 0, x, color=tone, lw=1.2, alpha=0.6)
            axes.plot(x, y, **{**_line(colour[student]), "ls": ""}, markersize=5.5, label=_cut(student))
        axes.axvline(0, color=_LIGHT["muted"], lw=1)
        labels = [f"{_cut(move.name)}  (n = {move.n:,.0f})" for move in shown]
        axes.set_yticks(range(len(shown)), labels, color=_LIGHT["ink"])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(f"recall less that of {_cut(baseline)}, points")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.grid(visible=False, axis="y")
        axes.set_title(title, pad=8 + 15 * lines)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, fontsize=9)

    height = 1.0 + 0.2 * lines + len(shown) * max(0.26, 0.15 * len(students))
    return _svg(name, title, (5.6, height), draw)


def standalone(svg: str) -> str:
    """An inlined figure as a file of its own, with both palettes."""
    scheme = "".join(f"--{name}:{dark};" for name, (_, dark) in PALETTE.items())
    style = f"<style>svg{{font-family:sans-serif}}@media(prefers-color-scheme:dark){{svg{{{scheme}}}}}</style>"
    head, body = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'


def ticks(low: float, high: float) -> list[float]:
    """Densities 1, 2, 5 x 10^-n between ``low`` and ``high``, the nearest one where none lies between."""
    series = [m * 10.0**-n for n in range(12) for m in (1, 0.5, 0.2)]
    inside = [t for t in series if low * 0.999 <= t <= high * 1.001]
    return inside or [min(series, key=lambda t: abs(t - low))]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as needed to stand ``gap`` apart, in order, within [0, 1] if they fit.

    Neighbours that are too close form a group, spaced evenly about the mean of where they wanted to be;
    groups that touch then merge.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        extent = gap * (len(group) - 1)
        wanted = sum(places[i] for i in group) / len(group) - extent / 2
        return max(0.0, min(wanted, 1 - extent))

    for index in order:
        groups.append([index])
        while len(groups) > 1 and start(groups[-2]) + gap * len(groups[-2]) > start(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        for step, index in enumerate(group):
            moved[index] = start(group) + gap * step
    return moved


def window(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits of a vertical axis: of each series all, or less the first fifth where that is most of the range.

    A first epoch at chance level would otherwise press the rest of a learning curve into one line.
    """
    every = [y for ys in series for y in ys]
    later = [y for ys in series for y in ys[len(ys) // 5 :]]
    chosen = later if max(later) - min(later) < (max(every) - min(every)) / 2 else every
    margin = 0.06 * (max(chosen) - min(chosen)) or 0.06 * abs(chosen[0]) or 1.0
    return min(chosen) - margin, max(chosen) + margin


def _line(index: int) -> dict[str, Any]:
    return {"color": _LIGHT[f"series-{index}"], "marker": _MARKERS[index]}


def _value_axis(axes: Axes, measured: Metric) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 1.02) if measured.share else high)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    scale, unit = (100, "%") if measured.share else (1, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:.4g}{unit}"))


def _label(axes: Axes, labels: Sequence[tuple[str, float, float, int]]) -> None:
    """Texts in the right margin, level with what they name and tied to it by a hair line."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes that were added to a figure know it"
    inches = figure.get_size_inches()[1] - 0.85
    places = spread([(y - low) / (high - low) for _, _, y, _ in labels], 0.19 / inches)
    for (text, x, y, index), place in zip(labels, places):
        tone = _LIGHT[f"series-{index}"]
        axes.annotate(
            text, (x, y), (1.05, place), textcoords="axes fraction", va="center", color=tone,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": tone, "lw": 0.6, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def _cut(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _svg(name: str, title: str, inches: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """A figure with one pair of axes, drawn and made ready to be inlined."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: bytes, prefix: str, title: str) -> str:
    """Matplotlib's SVG rewritten as the module's docstring says."""
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            element.set(key, _attribute(key, value, prefix))
        element.tail = None
    box = root.get("viewBox", "0 0 400 230")
    root.attrib.clear()
    for key, value in (("viewBox", box), ("role", "img"), ("aria-label", title)):
        root.set(key, value)
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return value.replace("#", f"#{prefix}-", 1)
    if key == "style":
        parts = [part.strip() for part in value.split(";")]
        value = ";".join(part for part in parts if part and not part.startswith("font-family"))
        for light, variable in _VARIABLE.items():
            value = value.replace(light, variable)
        return value
    return value.replace("url(#", f"url(#{prefix}-")
