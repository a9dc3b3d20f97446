"""Curves and bars of a report, as SVG."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from workbench.report.bands import Band
from workbench.report.format import Metric, count, percent
from workbench.report.summary import Curve
from workbench.report.svg import LIGHT, drawn

_MARKERS = "osD^vPXp"


class HasMetric(Protocol):
    """A curve of one metric."""

    @property
    def metric(self) -> Metric:
        """The metric."""
        ...


CurveT = TypeVar("CurveT", bound=HasMetric)


def learning(name: str, title: str, curves: Sequence[Curve], colour: Mapping[str, int]) -> str:
    """The metric after each epoch as SVG, each curve labelled at its end."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(curve.x, curve.y, **line(colour[curve.stage]), markersize=3.5 if len(curve.x) < 40 else 0)
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_ylim(window([c.y for c in curves]))
        value_axis(axes, curves[0].metric)
        label(axes, [(cut(c.stage), c.x[-1], c.y[-1], colour[c.stage]) for c in curves])

    return drawn(name, title, (5.6, max(3.2, 1.2 + 0.24 * len(curves))), draw)


def over_seeds(
    name: str, title: str, bands: Sequence[Band], measured: Metric | None, limits: tuple[float, float]
) -> str:
    """Means over seeds against density as SVG, densest left, with their intervals.

    Args:
        name: The figure's, of which its identifiers are made.
        title: Above it.
        bands: One a curve; its dense level is a dashed line, what is marked has a ring.
        measured: The metric, or None of a count.
        limits: Of the vertical axis.
    """

    def draw(axes: Axes) -> None:
        density_axis(axes, [band.x for band in bands])
        axes.set_ylim(limits)
        value_axis(axes, measured)
        floor, top = axes.get_ylim()
        labels = []
        for band in bands:
            tone = LIGHT[f"series-{band.tone}"]
            low, high = ([y if end is None else end for y, end in zip(band.y, ends)] for ends in (band.low, band.high))
            axes.fill_between(band.x, low, high, color=tone, alpha=0.15, lw=0)
            axes.plot(band.x, band.y, **line(band.tone), markersize=4)
            ringed = [(x, y) for x, y, marked in zip(band.x, band.y, band.marked) if marked]
            axes.plot(
                [x for x, _ in ringed], [y for _, y in ringed],
                ls="", marker="o", markersize=9.5, mfc="none", mec=LIGHT["ink"], mew=1.1,
            )  # fmt: skip
            if band.dense is not None:
                axes.axhline(band.dense, color=tone, lw=1, ls=(0, (5, 4)))
            seen = [(x, y) for x, y in zip(band.x, band.y) if floor <= y <= top]
            x, y = seen[-1] if seen else (band.x[-1], band.y[-1])
            labels.append((cut(band.name), x, min(max(y, floor), top), band.tone))
        label(axes, labels)

    return drawn(name, title, (5.6, max(3.4, 1.2 + 0.24 * len(bands))), draw)


def bars(
    name: str,
    title: str,
    entries: Sequence[tuple[str, float, str]],
    colour: Mapping[str, int],
    show: Callable[[float], str],
    limit: tuple[float, str] | None = None,
) -> str:
    """Horizontal bars as SVG, first on top: (stage, value, text at its end), and a dashed line at ``limit``."""

    def draw(axes: Axes) -> None:
        longest = max([value for _, value, _ in entries] + ([limit[0]] if limit else [])) or 1.0
        for place, (stage, value, text) in enumerate(entries):
            tone = LIGHT[f"series-{colour[stage]}" if stage in colour else "muted"]
            axes.barh(place, value, height=0.56, color=tone, linewidth=0)
            axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", size=9)
        if limit:
            axes.axvline(limit[0], color=LIGHT["muted"], lw=1, ls=(0, (5, 4)))
            axes.annotate(
                limit[1], (limit[0], 1), (-3, 2), ("data", "axes fraction"), "offset points",
                ha="right", va="bottom", size=9, color=LIGHT["muted"],
            )  # fmt: skip
        axes.set_yticks(range(len(entries)), [cut(stage) for stage, _, _ in entries], color=LIGHT["ink"])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.grid(visible=False, axis="y")

    return drawn(name, title, (5.6, 0.9 + 0.32 * len(entries)), draw)


def ticks(low: float, high: float) -> list[float]:
    """Densities 1, 2, 5 x 10^-n between ``low`` and ``high``, the nearest one if there is none."""
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


def reach(bands: Sequence[Band], leads: Sequence[Band]) -> tuple[float, float]:
    """Limits of a vertical axis: the window of the means of ``leads``, and room for what else there is.

    For other means up to four times as much, for intervals as much again: a control that has fallen far, or the
    interval of two seeds, would otherwise compress the rest into one line.
    """
    low, high = window([band.y[::-1] for band in leads])
    least, most = low, high
    for room, every in (
        (4, [y for band in bands for y in band.y]),
        (1, [y for band in bands for y in (*band.low, *band.high) if y is not None]),
    ):
        floor, top = low - room * (high - low), high + room * (high - low)
        margin = 0.03 * (high - low)
        least = min([least, *(max(floor, y - margin) for y in every)])
        most = max([most, *(min(top, y + margin) for y in every)])
    return least, most


def density_axis(axes: Axes, densities: Sequence[Sequence[float]]) -> float:
    """A logarithmic axis, densest left; where it ends."""
    low, high = min(map(min, densities)), max(map(max, densities))
    axes.set_xscale("log")
    axes.set_xlim(high * 1.08, low / 1.08)
    axes.set_xlabel("density: kept / prunable weights")
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    return low / 1.08


def by_metric(name: str, curves: Sequence[CurveT]) -> list[tuple[str, list[CurveT]]]:
    """The curves in groups of one metric each, with a file name per group."""
    groups: dict[Metric, list[CurveT]] = {}
    for curve in curves:
        groups.setdefault(curve.metric, []).append(curve)
    return [(name if i == 0 else f"{name}-{i + 1}", group) for i, group in enumerate(groups.values())]


def line(index: int) -> dict[str, Any]:
    """Colour and marker of a stage's number, for ``axes.plot``."""
    return {"color": LIGHT[f"series-{index}"], "marker": _MARKERS[index]}


def value_axis(axes: Axes, measured: Metric | None) -> None:
    """The vertical axis of a metric, or of a count."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    if measured is None:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 1.02) if measured.share else high)
    scale, unit = (100, "%") if measured.share else (1, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:.4g}{unit}"))


def label(axes: Axes, labels: Sequence[tuple[str, float, float, int]]) -> None:
    """Texts in the right margin, level with what they name and tied to it by a hair line."""
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes that were added to a figure know it"
    inches = figure.get_size_inches()[1] - 0.85
    places = spread([(y - low) / (high - low) for _, _, y, _ in labels], 0.19 / inches)
    for (text, x, y, index), place in zip(labels, places):
        tone = LIGHT[f"series-{index}"]
        axes.annotate(
            text, (x, y), (1.05, place), textcoords="axes fraction", va="center", color=tone,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": tone, "lw": 0.6, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def cut(text: str, length: int = 22) -> str:
    """The text, or its beginning where it is too long for a label."""
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
