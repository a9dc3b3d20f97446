"""How far a training is, and when in it something is to happen."""

import math
from typing import NamedTuple

from workbench.duration import Duration


class Moment(NamedTuple):
    """How far a training is.

    Args:
        step: Optimizer updates done.
        epoch: Epochs done, with the share of the one that is under way.
    """

    step: int
    epoch: float

    def at(self, unit: str) -> float:
        """In updates (``"it"``) or epochs (``"ep"``)."""
        return self.step if unit == "it" else self.epoch

    def since(self, begin: Duration, end: Duration) -> float:
        """Share of the way from ``begin`` to ``end``; below 0 before, above 1 after."""
        return (self.at(end.unit) - begin.value) / (end.value - begin.value)

    def passed(self, every: Duration) -> int:
        """How often ``every`` has passed."""
        return math.floor(self.at(every.unit) / every.value)


START = Moment(0, 0.0)


def check_times(begin: Duration, end: Duration, every: Duration) -> None:
    """Whether there is a way from ``begin`` to ``end`` in steps of ``every``.

    Raises:
        ValueError: If not.
    """
    if begin.value and begin.unit != end.unit:
        raise ValueError(f"begin is {begin} and end {end}: give both in epochs or both in steps")
    if begin.value >= end.value:
        raise ValueError(f"begin is {begin} and end {end}: the end comes after the beginning")
    if every.value < 1:
        raise ValueError(f"every is {every}: give at least 1ep or 1it")
