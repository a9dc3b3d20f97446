"""Means over seeds: what is drawn of them, and how they read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.records import Estimate
from workbench.report.format import DASH, Metric


@dataclass(frozen=True)
class Band:
    """Means over seeds against density, densest first.

    Attributes:
        name: Stands at its end.
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
    known = [(d, e, marked) for d, e, marked in points if d and d > 0 and e is not None]
    known.sort(key=lambda point: -point[0])
    if not known:
        return None
    x, found, marked = (list(part) for part in zip(*known))
    return Band(name, tone, x, [e.mean for e in found], [e.low for e in found], [e.high for e in found], marked, dense)


def spread(found: Estimate | None, measured: Metric) -> str:
    """A mean and half its interval: ``97.85% ± 0.12``."""
    if found is None:
        return DASH
    if found.low is None or found.high is None:
        return measured.show(found.mean)
    return f"{measured.show(found.mean)} ± {measured.change((found.high - found.low) / 2).lstrip('+')}"


def between(found: Estimate, measured: Metric) -> str:
    """The ends of a difference's interval; empty if there is none."""
    if found.low is None or found.high is None:
        return ""
    return f"{measured.change(found.low)} to {measured.change(found.high)}"


def number(n: Sequence[int | None]) -> str:
    """How many seeds there are: ``n = 3 seeds``, ``n = 3 to 4 seeds``."""
    known = sorted({each for each in n if each is not None})
    if not known:
        return "n not recorded"
    told = f"n = {known[0]}" if len(known) == 1 else f"n = {known[0]} to {known[-1]}"
    return f"{told} seed{'' if known == [1] else 's'}"


def sample(n: Sequence[int | None], seeds: Sequence[str], found: Iterable[Estimate]) -> str:
    """N and the kind of interval, in words: ``n = 3 seeds (0, 1, 2), 95% t intervals``.

    Args:
        n: Of every mean; one is told if all are alike, else the range.
        seeds: Which they are; empty if that is not known.
        found: The means.
    """
    told = number(n) + (f" ({', '.join(seeds)})" if seeds else "")
    levels = [e.confidence for e in found if e.low is not None]
    if not levels:
        return f"{told}, no interval"
    return f"{told}, {100 * (levels[0] or 0.95):g}% t intervals"
