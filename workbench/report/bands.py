"""Means over seeds: what is drawn of them, and how they read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.records import Estimate, Interval
from workbench.report.format import DASH, Metric


@dataclass(frozen=True)
class Band:
    """Means over seeds against density, densest first.

    Attributes:
        name: Its label, drawn at its end.
        tone: Number of its colour and marker.
        x: Densities.
        y: Means.
        low: Lower ends of their intervals, None where n does not allow one.
        high: Upper ends.
        marked: What gets a ring.
        dense: Where a dashed line is, for the dense network.
    """

    name: str
    tone: int
    x: list[float]
    y: list[float]
    low: list[float | None]
    high: list[float | None]
    marked: list[bool]
    dense: float | None = None


def band(
    name: str,
    tone: int,
    points: Iterable[tuple[float | None, Estimate | None, bool]],
    dense: float | None = None,
) -> Band | None:
    """Density, mean and whether it is marked, of each point, drawn; None if no point has both."""
    finite = [(d, e, marked) for d, e, marked in points if d and d > 0 and e is not None]
    finite.sort(key=lambda point: -point[0])
    if not finite:
        return None
    x, estimates, marked = (list(part) for part in zip(*finite))
    low, high = ([getattr(e.interval, end, None) for e in estimates] for end in ("low", "high"))
    return Band(name, tone, x, [e.mean for e in estimates], low, high, marked, dense)


def spread(estimate: Estimate | None, measured: Metric) -> str:
    """A mean and half its interval: ``97.85% ± 0.12``."""
    if estimate is None:
        return DASH
    if estimate.interval is None:
        return measured.show(estimate.mean)
    half = (estimate.interval.high - estimate.interval.low) / 2
    return f"{measured.show(estimate.mean)} ± {measured.change(half).lstrip('+')}"


def ends(interval: Interval | None, measured: Metric) -> str:
    """The ends of a difference's interval, ``+0.02 to +0.31``; empty if there is none."""
    return "" if interval is None else f"{measured.change(interval.low)} to {measured.change(interval.high)}"


def number(n: Sequence[int | None]) -> str:
    """How many seeds there are: ``n = 3 seeds``, ``n = 3 to 4 seeds``."""
    counts = sorted({each for each in n if each is not None})
    if not counts:
        return "n not recorded"
    text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return f"{text} seed{'' if counts == [1] else 's'}"


def sample(n: Sequence[int | None], seeds: Sequence[str], estimates: Iterable[Estimate]) -> str:
    """N and the kind of interval, in words: ``n = 3 seeds (0, 1, 2), 95% t intervals``.

    Args:
        n: Of every mean; one number if all are alike, else the range.
        seeds: Which they are; empty if that is not known.
        estimates: The means.
    """
    text = number(n) + (f" ({', '.join(seeds)})" if seeds else "")
    intervals = [e.interval for e in estimates if e.interval is not None]
    return f"{text}, {100 * intervals[0].confidence:g}% t intervals" if intervals else f"{text}, no interval"
