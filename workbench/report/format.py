"""Numbers into words: the one place that decides how a figure in a report reads."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.messages import elapsed

DASH = "\N{EM DASH}"
_MINUS = "\N{MINUS SIGN}"
# Metrics that are shares of a whole, shown in percent and compared in points. A bounded score that is not a
# share (a correlation, a cosine) keeps its own scale.
_SHARES = ("accuracy", "precision", "recall", "f1", "auroc", "iou", "agreement", "specificity")


@dataclass(frozen=True)
class Metric:
    """A run's main metric: its name, whether more is better, whether it is a share of a whole.

    Attributes:
        name: As recorded, without the split: ``accuracy``.
        mode: ``max`` or ``min``.
        share: Shown in percent, differences in percentage points.
    """

    name: str
    mode: str
    share: bool

    @property
    def unit(self) -> str:
        """The unit of a difference, with its leading space: `` points`` or nothing."""
        return " points" if self.share else ""

    @property
    def heading(self) -> str:
        """The heading of a column of differences."""
        return "points" if self.share else "change"

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        return "higher is better" if self.mode == "max" else "lower is better"

    def show(self, value: float | None) -> str:
        """``98.06%`` for a share, four significant digits for anything else."""
        if value is None or not math.isfinite(value):
            return DASH if value is None else str(value)
        return _signed(f"{100 * value:.2f}%" if self.share else f"{value:.4g}")

    def change(self, value: float | None) -> str:
        """A difference with its sign, in points for a share: ``+0.28``."""
        if value is None or not math.isfinite(value):
            return DASH if value is None else str(value)
        text = f"{100 * value:+.2f}" if self.share else f"{value:+.3g}"
        return "0" + text[2:] if float(text) == 0 else _signed(text)

    def distance(self, value: float) -> str:
        """A difference in a sentence: ``0.28 points below``, ``equal to``."""
        text = self.change(abs(value)).lstrip("+")
        return "equal to" if float(text) == 0 else f"{text}{self.unit} {'below' if value < 0 else 'above'}"

    def within(self, value: float, reference: float, tolerance: float) -> bool:
        """Whether ``value`` is no worse than ``reference`` by more than the tolerance.

        The tolerance is absolute for a share (0.01 is one point) and relative to the reference otherwise.
        """
        loss = reference - value if self.mode == "max" else value - reference
        return loss <= (tolerance if self.share else tolerance * abs(reference)) + 1e-12

    def margin(self, value: float) -> str:
        """An absolute difference that is allowed, in words: ``1 point``, ``0.02``."""
        text = f"{100 * value if self.share else value:g}"
        return f"{text} point{'' if text == '1' else 's'}" if self.share else text

    def tolerance(self, value: float) -> str:
        """The tolerance in words: ``1 point`` or ``1%``."""
        points = f"{100 * value:g}"
        return f"{points} point{'s' if points != '1' else ''}" if self.share else f"{points}%"


def metric(name: str, mode: str, values: Iterable[float | None]) -> Metric:
    """The metric ``name``; it is a share if it is called one and every recorded value lies in [0, 1]."""
    called = mode == "max" and any(word in name.lower() for word in _SHARES)
    return Metric(name, mode, called and all(v is None or math.isnan(v) or 0 <= v <= 1 for v in values))


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return DASH if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share of one in percent, three significant digits: ``34.3%``."""
    return DASH if value is None else f"{100 * value:.3g}%"


def size(value: float | None) -> str:
    """Bytes in decimal units, one decimal: ``104.5 kB``."""
    if value is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:.0f} B"


def times(value: float | None) -> str:
    """How many times smaller: ``7.0×``."""
    return DASH if value is None else f"{value:,.1f}\N{MULTIPLICATION SIGN}"


def duration(value: float | None) -> str:
    """Seconds in words."""
    return DASH if value is None else elapsed(value)


def plural(number: int, word: str) -> str:
    """``1 stage``, ``2 stages``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def _signed(text: str) -> str:
    """The typographic minus in place of the hyphen."""
    return text.replace("-", _MINUS)
