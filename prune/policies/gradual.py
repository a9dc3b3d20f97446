"""Denser to sparser while the network trains."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn

from prune.policies.history import axes_of, named
from prune.policies.online import OnlineScores
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp, check_times
from prune.pruner import Pruner
from prune.schedule import SCHEDULES, check_density
from workbench.duration import Duration

Schedule = Callable[[float, float, float], float]


@final
class Gradual(Policy):
    """Prunes a network while it trains, on a schedule, and keeps what is pruned at zero.

    The density is ``initial`` at ``begin``, ``density`` from ``end`` on, and that of ``schedule`` in between. It is
    lowered after the update that reaches ``begin``, whenever another multiple of ``every`` has passed, and at ``end``.
    Masks are nested, and keep exactly the share of the density. A structure that allows nothing between some
    d and 1, such as 2:4, is pruned to d at the first pruning, and on from there once the schedule is below d.

    Scores of a criterion of gradients (movement, taylor, snip) are summed over the updates from the first to ``end``.
    The sum goes on when weights are pruned, as in movement pruning, and is part of the state. The other criteria that
    need data, and these before the first update, are calibrated on ``batches`` at every pruning.

    A second training of the same network goes on from the masks held, if the network still obeys them; another network
    starts dense.

    Args:
        density: Share of the prunable weights to keep at the end, in (0, 1].
        begin: When to start, e.g. "1ep" or "500it": epochs or updates. 0 is before the first. A Lightning Trainer
            counts updates as ``trainer.global_step``: each step of each of several optimizers is one.
        end: When to be done, in the same unit.
        every: Time between two prunings, in either unit.
        pruner: Which weights go; the smallest of the whole network by default.
        initial: Density at ``begin``, in [density, 1].
        schedule: ``"cubic"``, ``"linear"``, ``"geometric"``, ``"one_shot"``, or a function of progress (0 to 1),
            ``density`` and ``initial``.
        batches: How many training batches a criterion that needs data is calibrated on, 1 or more.

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, if it ends before
            ``end``, or the criterion needs data and there is none; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, if a layer collapses; as :meth:`Policy.attach`; when training ends before ``end``.

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
        batches: int = 16,
    ) -> None:
        self.begin, self.end, self.every = (Duration.parse(time) for time in (begin, end, every))
        super().__init__(self.begin, self.end, self.every, batches=batches)
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
        self.starts_dense = initial == 1 or self.begin.value > 0
        self._load_state({})

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.pruner.scope(model)

    def _start(self, time: Timestamp, resumed: bool) -> None:
        if self._online is None:
            self._check_pruner(self.pruner)
        assert self._model is not None, "attached"
        self.pruner.check(self._model, self.density)
        self._densest = self.pruner.densest(self._model)
        if self._online is not None:
            units = self.pruner.gates(self._model)
            self._scores = OnlineScores(self._online, self._weights, units, self._stored)
        self._stored = {}
        if time.step == 0:
            self._after_update(time)

    def _needs_dense_gradients(self, time: Timestamp) -> bool:
        return False

    def _read_gradients(self, time: Timestamp) -> None:
        if self._scores is not None and self._target > self.density:
            # A penalty such as sqrt|w| has no finite gradient at a pruned weight.
            self._scores.add(self._weights, self._gradients(of_pruned=False))

    def _after_update(self, time: Timestamp) -> None:
        progress = time.progress(self.begin, self.end)
        if progress < 0:
            return
        passed = math.inf if progress >= 1 else time.passed(self.every)
        if passed <= self._passed:
            return
        self._passed = passed
        target = self.schedule(min(progress, 1.0), self.density, self.initial)
        target = min(target, self._densest) if target < 1 else target
        if target >= self._target:
            return
        self._target = target
        if target < 1:
            scores = {} if self._scores is None else self._scores.arguments(self._weights)
            self._enforce(self._select(self.pruner, target, scores))
        if target <= self.density:
            self._scores = None

    def _state(self) -> dict[str, Any]:
        scores = self._stored | ({} if self._scores is None else self._scores.state(self._weights))
        return {"target": self._target, "passed": self._passed, "scores": scores}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._target, self._passed = state.get("target", math.inf), state.get("passed", -1.0)
        self._scores: OnlineScores | None = None
        self._stored: dict[str, Tensor] = dict(state.get("scores", {}))  # whole, as in the checkpoint, until attached

    def check_budget(self, updates: float, epochs: float) -> None:
        """Refuse a training that is over before ``end``."""
        budget = updates if self.end.unit == "it" else epochs
        if self._target > self.density and self.end.value > budget:
            raise ValueError(
                f"end is {self.end}, but training has {budget}{self.end.unit} only: end earlier, or train for longer"
            )

    def _settings(self) -> dict[str, Any]:
        times = {name: str(getattr(self, name)) for name in ("begin", "end", "every")}
        schedule = {"initial": self.initial, "schedule": named(self.schedule)}
        return {"density": self.density, **times, **schedule, **axes_of(self.pruner)}

    def at_final_density(self) -> bool:
        """From the pruning at ``end`` on."""
        return self._target <= self.density

    def shortfall(self) -> str | None:
        """The density reached, if it is not the final one."""
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
