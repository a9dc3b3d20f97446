"""Denser to sparser while the network trains."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import nn

from prune.policies.base import Moment, Policy
from prune.pruner import Pruner, prunable
from prune.schedule import SCHEDULES, check_density
from workbench.duration import Duration

Schedule = Callable[[float, float, float], float]


@final
class Gradual(Policy):
    """Prunes a network while it trains, on a schedule, and keeps what is pruned at zero.

    The density is ``initial`` at ``begin``, ``density`` from ``end`` on, and that of ``schedule`` in between. It is
    lowered after the update that reaches ``begin``, whenever another multiple of ``every`` has passed, and at ``end``.
    Masks are nested, and keep exactly as many weights as the density says.

    Attached a second time it goes on from the masks held, if the network still obeys them; another network starts
    dense.

    Args:
        density: Share of the prunable weights to keep at the end, in (0, 1].
        begin: When to start, e.g. "1ep" or "500it": epochs or updates. 0 is before the first.
        end: When to be done, in the same unit.
        every: Time between two prunings, in either unit.
        pruner: Which weights go; the smallest of the whole network by default.
        initial: Density at ``begin``, in [density, 1].
        schedule: ``"cubic"``, ``"linear"``, ``"geometric"``, ``"one_shot"``, or a function of progress (0 to 1),
            ``density`` and ``initial``.

    Raises:
        ValueError: If an argument is out of range or the units differ; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, from the pruner's allocation, if a layer collapses.

    Reference: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, section 3.
    """

    def __init__(
        self,
        density: float,
        begin: str | Duration,
        end: str | Duration,
        every: str | Duration,
        pruner: Pruner | None = None,
        initial: float = 1.0,
        schedule: str | Schedule = "cubic",
    ) -> None:
        self.begin, self.end, self.every = (Duration.parse(time) for time in (begin, end, every))
        super().__init__(self.begin, self.end, self.every)
        check_density(density)
        check_density(initial)
        if initial < density:
            raise ValueError(f"initial density {initial} is below the final one, {density}: pruning only removes")
        check_times(self.begin, self.end, self.every)
        self.density, self.initial = density, initial
        self.pruner = Pruner() if pruner is None else pruner
        self.schedule = _parsed(schedule)
        self._target, self._passed = math.inf, -1.0

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return prunable(model, self.pruner.include, self.pruner.exclude)

    def _begin(self, moment: Moment, taken_up: bool) -> None:
        if moment.step == 0:
            self._advance(moment)

    def _needs_dense(self, moment: Moment) -> bool:
        return False

    def _observe(self, moment: Moment) -> None:
        pass

    def _advance(self, moment: Moment) -> None:
        progress = progressed(moment, self.begin, self.end)
        if progress < 0:
            return
        passed = math.inf if progress >= 1 else multiples(moment, self.every)
        if passed <= self._passed:
            return
        self._passed = passed
        target = self.schedule(min(progress, 1.0), self.density, self.initial)
        if target >= self._target:
            return
        self._target = target
        if target < 1:
            assert self._model is not None, "attached"
            self._enforce(self.pruner(self._model, target, within=self.masks))

    def _progress(self) -> dict[str, Any]:
        return {"target": self._target, "passed": self._passed}

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        self._target, self._passed = progress.get("target", math.inf), progress.get("passed", -1.0)

    def check_budget(self, updates: float, epochs: float) -> None:
        """Refuse a training that is over before ``end``."""
        budget = Moment(0, epochs)._replace(step=updates).at(self.end.unit)
        if self._target > self.density and self.end.value > budget:
            raise ValueError(
                f"end is {self.end}, but training has {budget}{self.end.unit} only: end earlier, or train for longer"
            )

    def unmet(self) -> str | None:
        """The final density, if it has not been reached."""
        if self._target <= self.density:
            return None
        now = 1.0 if self.masks is None else self.masks.density
        return f"density {now:.4g}, not {self.density}: it was to be reached at {self.end}"


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


def progressed(moment: Moment, begin: Duration, end: Duration) -> float:
    """Share of the way from ``begin`` to ``end``; below 0 before, above 1 after."""
    return (moment.at(end.unit) - begin.value) / (end.value - begin.value)


def multiples(moment: Moment, every: Duration) -> int:
    """How often ``every`` has passed."""
    return math.floor(moment.at(every.unit) / every.value)


def _parsed(schedule: str | Schedule) -> Schedule:
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: give one of {list(SCHEDULES)}, or a function")
    return SCHEDULES[schedule]
