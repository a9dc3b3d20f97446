"""Denser to sparser while the network trains."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from prune.masks.memory import gathered, local, shard
from prune.policies.moment import Moment, check_times
from prune.policies.policy import Policy
from prune.pruner import Pruner
from prune.schedule import SCHEDULES, check_density
from workbench.duration import Duration

Schedule = Callable[[float, float, float], float]


@final
class Gradual(Policy):
    """Prunes a network while it trains, on a schedule, and keeps what is pruned at zero.

    The density is ``initial`` at ``begin``, ``density`` from ``end`` on, and that of ``schedule`` in between. It is
    lowered after the update that reaches ``begin``, whenever another multiple of ``every`` has passed, and at ``end``.
    Masks are nested, and keep exactly as many weights as the density says. A structure that allows nothing between some
    d and 1, such as 2:4, is pruned to d at the first pruning, and on from there once the schedule is below d.

    A criterion of gradients (movement, taylor, snip) is summed up while training: what each update adds, from the first
    one until ``end``. The sum is not begun anew when weights go, as in movement pruning, and is part of the state. The
    other criteria that look at data, and these before the first update, are shown ``evidence`` at every pruning.

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
        ValueError: If an argument is out of range or the units differ; when attached, if the criterion looks at data
            and there is no ``evidence``; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, from the pruner's allocation, if a layer collapses; as :meth:`Policy.attach`.

    References: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, section 3; Sanh et al., Movement
    Pruning, 2020, arXiv:2005.07683, section 3.
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
        self._online = self.pruner.axes.criterion.online
        self.reads_gradients = self._online is not None
        self._take_up({})

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.pruner.scope(model)

    def _begin(self, moment: Moment, taken_up: bool) -> None:
        if self._online is None:
            self._check_pruner(self.pruner)
        assert self._model is not None, "attached"
        self.pruner.check(self._model, self.density)
        self._densest = self.pruner.densest(self._model)
        self._scores |= {name: shard(score, self._weights[name]) for name, score in self._stored.items()}
        self._stored = {}
        if moment.step == 0:
            self._advance(moment)

    def _needs_dense(self, moment: Moment) -> bool:
        return False

    def _observe(self, moment: Moment) -> None:
        if self._online is None or self._target <= self.density:
            return
        for name, grad in self._gradients(dead=False).items():
            weight = self._weights[name]
            added = self._online(local(weight), local(grad))
            if self.masks is not None:
                added = added.masked_fill(~shard(self.masks[name], weight), 0)
            self._scores[name] = self._scores[name] + added if name in self._scores else added

    def _advance(self, moment: Moment) -> None:
        progress = moment.since(self.begin, self.end)
        if progress < 0:
            return
        passed = math.inf if progress >= 1 else moment.passed(self.every)
        if passed <= self._passed:
            return
        self._passed = passed
        target = self.schedule(min(progress, 1.0), self.density, self.initial)
        target = min(target, self._densest) if target < 1 else target
        if target >= self._target:
            return
        self._target = target
        if target < 1:
            self._enforce(self._choose(self.pruner, target, self._summed()))
        if target <= self.density:
            self._scores = {}

    def _summed(self) -> dict[str, Tensor] | None:
        if not self._scores:
            return None
        zeros = {n: torch.zeros(w.shape, device=w.device) for n, w in self._weights.items() if n not in self._scores}
        return zeros | self._gathered()

    def _gathered(self) -> dict[str, Tensor]:
        return {name: gathered(part, self._weights.get(name)) for name, part in self._scores.items()}

    def _progress(self) -> dict[str, Any]:
        scores = {name: score.cpu() for name, score in (self._stored | self._gathered()).items()}
        return {"target": self._target, "passed": self._passed, "scores": scores}

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        self._target, self._passed = progress.get("target", math.inf), progress.get("passed", -1.0)
        self._scores: dict[str, Tensor] = {}  # what this rank holds of them
        self._stored: dict[str, Tensor] = dict(progress.get("scores", {}))

    def check_budget(self, updates: float, epochs: float) -> None:
        """Refuse a training that is over before ``end``."""
        budget = updates if self.end.unit == "it" else epochs
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


def _parsed(schedule: str | Schedule) -> Schedule:
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: give one of {list(SCHEDULES)}, or a function")
    return SCHEDULES[schedule]
