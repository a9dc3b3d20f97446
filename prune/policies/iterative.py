"""Iterative pruning: train, prune what is left, rewind, train again, level after level."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import nn

from prune.levels import Levels
from prune.masks import Masks
from prune.policies.history import axes_of
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp
from prune.pruner import Pruner
from prune.rewinding.modes import MODES, Groups, Rewind, groups_of, hold, restore
from prune.rewinding.snapshot import Snapshot
from workbench.duration import Duration


@final
class Iterative(Policy):
    """Trains, prunes, rewinds and trains again in one training: the levels of the search for a lottery ticket.

    Level 0 trains dense. At the end of a level the network is pruned to the next density, nested in the last masks, and
    goes back to the rewind point, before which nothing was pruned. The last level is trained to its end.

    It does not know when a level ends: a callback calls, in this order, :meth:`record_metrics` after every epoch,
    sets :attr:`point` and :attr:`position` at the rewind point, and in fine-tuning (:attr:`starts_at_end`) once more at
    the end of level 0; at the end of a level it calls :meth:`end_level`, then :meth:`start_next_level` unless
    :attr:`finished`.

    Args:
        levels: How many times to prune, or in which steps: ``Levels(density=0.1, rate=0.3)``. Or give ``density``.
        density: Share of the prunable weights to reach, in (0, 1]: the last level is the first at or below it. Or a
            list with the density of every level.
        rewind: Where each level after 0 starts: "0it" at the initial weights, "500it" after 500 updates of level 0,
            "2ep" after two epochs of it; or also what goes back there: ``Rewind("2ep", mode="weights")``.
        pruner: Which weights go; the smallest of the whole network by default.
        batches: How many training batches a criterion that needs data is calibrated on, 1 or more.

    Attributes:
        level: The one that is trained, from 0.
        targets: The density of each level.
        rewind: The rewind point.
        mode: What goes back there, a name in ``prune.rewinding.modes.MODES``.
        point: What training had where levels start, or None until then.
        position: What the callback needs besides to go back there.
        resumed: Whether a state has been loaded since it was last attached.
        stopped: Whether that was the state of a level that was asked to end early.
        rows: Of every level that has ended, ``level``, ``density`` of the pruned weights, ``model_density``,
            ``mask_hash``, ``steps`` (updates, from 0 at the beginning of level 0), the ``metrics`` at its end, the
            ``lowest`` and ``highest`` of each over its epochs, and what the callback adds.

    Raises:
        ValueError: If arguments are out of range; when training starts, if the rewind point is not before the end of a
            level, or the criterion needs data and there is none; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, if a layer collapses; as :meth:`Policy.attach`; when training ends before the last level.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv:1803.03635; Frankle, Dziugaite, Roy,
    Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671, algorithm 2; Renda,
    Frankle, Carbin, "Comparing Rewinding and Fine-tuning", 2020, arXiv:2003.02389.
    """

    def __init__(
        self,
        levels: int | Levels | None = None,
        density: float | list[float] | None = None,
        rewind: str | Duration | Rewind = "1ep",
        pruner: Pruner | None = None,
        batches: int = 16,
    ) -> None:
        start = Rewind.parse(rewind)
        self.rewind, self.mode = start.point, start.mode
        super().__init__(self.rewind, batches=batches)
        if start.order != "same":
            raise ValueError("rewind.order is 'fresh', which needs a training of its own a level: use prune.hunt")
        spec = Levels.parse(levels, density)
        spec.check_fixed("LotteryTicket")
        self.targets = list(spec.densities())
        self.pruner = Pruner() if pruner is None else pruner
        self._reset()

    def _reset(self) -> None:
        self.level = 0
        self.rows: list[dict[str, Any]] = []
        self.point: Snapshot | None = None
        self.position: dict[str, Any] = {}
        self._lowest: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.resumed = self.stopped = False
        self._groups: list[Groups] = []

    @property
    def starts_at_end(self) -> bool:
        """Whether levels start at the end of level 0 rather than at the rewind point: in fine-tuning."""
        return MODES[self.mode].moment == "end"

    @property
    def fine_tunes(self) -> bool:
        """Whether the level that is trained holds the last learning rate of level 0, and follows no schedule."""
        return self.starts_at_end and self.level > 0 and not self.finished

    @property
    def finished(self) -> bool:
        """Whether the last level has ended."""
        return len(self.rows) == len(self.targets)

    def record_metrics(self, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an epoch that has ended."""
        self._last = {name: float(value) for name, value in metrics.items()}
        for name, value in self._last.items():
            self._lowest[name] = min(self._lowest.get(name, math.inf), value)
            self._highest[name] = max(self._highest.get(name, -math.inf), value)

    def end_level(self, **more: Any) -> dict[str, Any]:
        """Add the row of the level, with ``more`` in it, and return it.

        Raises:
            ValueError: If the level ended before the rewind point.
        """
        assert self.masks is not None, "attached"
        if self.point is None:
            raise ValueError(f"level 0 ended before the rewind point {self.rewind}: rewind to an earlier one")
        row = {
            "level": self.level,
            "density": self.masks.density,
            "model_density": self.densities()["model_density"],
            "mask_hash": self.masks.hash(),
            "steps": self._updates,
            "metrics": self._last,
            "lowest": self._lowest,
            "highest": self._highest,
            **more,
        }
        self.rows.append(row)
        self._lowest, self._highest, self._last = {}, {}, {}
        self.stopped = False
        return row

    def parts(self, *others: str) -> tuple[list[str], list[str]]:
        """What went back when the level began and what did not: parts of the point and ``others``; none at level 0."""
        names = [*self.point.what, *others] if self.level and self.point is not None else []
        row = MODES[self.mode]
        return [name for name in names if row.returns(name)], [name for name in names if not row.returns(name)]

    def start_next_level(self, model: nn.Module, then: Callable[[], Any] = lambda: None, **objects: Any) -> None:
        """Select masks of the next density by the trained weights, go to where the level starts, enforce the masks.

        Args:
            model: What the point was taken of.
            then: Called when training is there, before the masks are enforced.
            objects: ``optimizers``, ``schedulers`` and ``scaler`` that the point was taken of.

        Raises:
            ValueError: If the density cannot be met, or weights are not finite.
        """
        assert self.point is not None, "taken"
        masks = self._select(self.pruner, self.targets[self.level + 1])
        restore(self.point, self.mode, model, **objects)
        then()
        self.level += 1
        self._enforce(masks)
        self.hold()

    def hold(self) -> None:
        """In fine-tuning, give the optimizers the learning rate, momentum and so on of level 0's last update."""
        for optimizer, groups in zip(self._optimizers, self._groups) if self.fine_tunes else ():
            hold(optimizer, groups)

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.pruner.scope(model)

    def _start(self, time: Timestamp, resumed: bool) -> None:
        assert self._model is not None, "attached"
        self._check_pruner(self.pruner)
        self.pruner.check(self._model, *self.targets)
        if not (resumed and (self.resumed or self.finished)):
            self._reset()
            self._enforce(Masks.ones(self._weights))
        self.resumed = False

    def _read_gradients(self, time: Timestamp) -> None:
        if self.starts_at_end and self.level == 0:
            self._groups = [groups_of(optimizer) for optimizer in self._optimizers]
        self.hold()

    def _state(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "rows": list(self.rows),
            "point": None if self.point is None else self.point.state_dict(),
            "position": self.position,
            "metrics": [self._last, self._lowest, self._highest],
            "groups": self._groups,
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._reset()
        if not state:
            return
        self.level, self.rows, self.position = state["level"], list(state["rows"]), state["position"]
        self._last, self._lowest, self._highest = map(dict, state["metrics"])
        self._groups = state["groups"]
        if state["point"] is not None:
            self.point = Snapshot()
            self.point.load_state_dict(state["point"])
        # A callback adds these two to a checkpoint that was written at the end of an epoch, before its hooks ran.
        self.resumed, self.stopped = True, state.get("stopped", False)
        if "epoch_metrics" in state:
            self.record_metrics(state["epoch_metrics"])

    def check_budget(self, updates: float, epochs: float) -> None:
        """Refuse a level that ends before the rewind point."""
        budget = updates if self.rewind.unit == "it" else epochs
        if self.rewind.value >= budget:
            raise ValueError(
                f"rewind is {self.rewind}, but a level trains for {budget:g}{self.rewind.unit} only: rewind to an "
                "earlier point"
            )

    def _settings(self) -> dict[str, Any]:
        rewind = {"at": str(self.rewind), "mode": self.mode}
        return {"levels": list(self.targets), "rewind": rewind, **axes_of(self.pruner)}

    def at_final_density(self) -> bool:
        """In the last level."""
        return self.level == len(self.targets) - 1

    def shortfall(self) -> str | None:
        """The level reached, if it is not the last one's end."""
        return None if self.finished else f"level {self.level} of {len(self.targets) - 1}"
