"""How far a training is, and the times that policies are given."""

import math
from typing import NamedTuple

from workbench.duration import Duration


class Timestamp(NamedTuple):
    """How far a training is.

    Args:
        step: Optimizer updates done.
        epoch: Epochs done, with the fraction of the current one.
    """

    step: int
    epoch: float

    def at(self, unit: str) -> float:
        """In updates (``"it"``) or epochs (``"ep"``)."""
        return self.step if unit == "it" else self.epoch

    def progress(self, begin: Duration, end: Duration) -> float:
        """Fraction of the time from ``begin`` to ``end`` that has passed; below 0 before, above 1 after."""
        return (self.at(end.unit) - begin.value) / (end.value - begin.value)

    def passed(self, every: Duration) -> int:
        """How often ``every`` has passed."""
        return math.floor(self.at(every.unit) / every.value)


START = Timestamp(0, 0.0)


def check_times(begin: Duration, end: Duration, every: Duration) -> None:
    """Check that ``end`` comes after ``begin``, in the same unit, and that ``every`` is a positive time.

    Raises:
        ValueError: If not.
    """
    if begin.value and begin.unit != end.unit:
        raise ValueError(f"begin is {begin} and end {end}: give both in epochs or both in steps")
    if begin.value >= end.value:
        raise ValueError(f"begin is {begin} and end {end}: the end comes after the beginning")
    if every.value < 1:
        raise ValueError(f"every is {every}: give at least 1ep or 1it")
