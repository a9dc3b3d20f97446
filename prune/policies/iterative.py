"""Iterative pruning: train, prune what is left, rewind, train again, level after level."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from torch import nn

from prune.masks import Masks
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp
from prune.pruner import Pruner
from prune.rewinding.snapshot import Snapshot
from prune.schedule import geometric, levels_to
from workbench.duration import Duration

_MODEL, _REST = ("weights", "buffers"), ("optimizers", "schedulers", "scaler")
REWINDS = {"all": (*_MODEL, *_REST), "weights": _MODEL, "learning_rate": _REST, "nothing": ()}


@final
class Iterative(Policy):
    """Trains, prunes, rewinds and trains again in one training: the levels of the search for a lottery ticket.

    Level 0 trains dense. At the end of a level the network is pruned to the next density, nested in the last masks, and
    goes back to the rewind point, before which nothing was pruned. The last level is trained to its end.

    It does not know when a level ends: a callback calls, in this order, :meth:`record_metrics` after every epoch,
    sets :attr:`point` and :attr:`position` at the rewind point, and at the end of a level calls :meth:`end_level`, then
    :meth:`start_next_level` unless :attr:`finished`.

    Args:
        levels: How many times to prune. Or give ``density``.
        rate: Share of the remaining weights pruned at each level, in [0, 1); 0 for the control that prunes nothing.
        density: Share of the prunable weights to reach, in (0, 1]; gives the number of levels.
        rewind: Where each level after 0 starts: "0it" at the initial weights, "500it" after 500 updates of level 0,
            "2ep" after two epochs of it.
        pruner: Which weights go; the smallest of the whole network by default.
        rewinds: ``"all"``; ``"weights"``, with the learning rate staying where the level ended; ``"learning_rate"``,
            all but weights and buffers (learning-rate rewinding); or ``"nothing"`` of the two: fine-tuning at the last
            learning rate.
        batches: How many training batches a criterion that needs data is calibrated on, 1 or more.

    Attributes:
        level: The one that is trained, from 0.
        targets: The density of each level.
        point: What training had at ``rewind``, or None until then.
        position: What the callback needs besides to go back there.
        resumed: Whether a state has been loaded since it was last attached.
        stopped: Whether that was the state of a level that was asked to end early.
        rows: Of every level that has ended, ``level``, ``density``, ``mask_hash``, ``steps`` (updates, from 0 at
            the beginning of level 0), the ``metrics`` at its end, the ``lowest`` and ``highest`` of each over its
            epochs, and what the callback adds.

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
        levels: int | None = None,
        rate: float = 0.2,
        density: float | None = None,
        rewind: str | Duration = "1ep",
        pruner: Pruner | None = None,
        rewinds: Literal["all", "weights", "learning_rate", "nothing"] = "all",
        batches: int = 16,
    ) -> None:
        self.rewind = Duration.parse(rewind)
        super().__init__(self.rewind, batches=batches)
        if (levels is None) == (density is None):
            raise ValueError("give levels (e.g. 10) or density (e.g. 0.1), and only one of them")
        if levels is not None and not isinstance(levels, int):
            raise ValueError(f"levels is {levels!r}: give how many times to prune, an integer such as 10")
        if rewinds not in REWINDS:
            raise ValueError(f"rewinds is {rewinds!r}: one of {list(REWINDS)}")
        count = levels if levels is not None else levels_to(1.0 if density is None else density, rate)
        self.targets = geometric(rate, count)
        self.pruner = Pruner() if pruner is None else pruner
        self.rewinds = rewinds
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

    def start_next_level(self, rewind: Callable[[], Any]) -> None:
        """Select masks of the next density by the trained weights, then ``rewind()``, then enforce the masks.

        Raises:
            ValueError: If the density cannot be met, or weights are not finite.
        """
        masks = self._select(self.pruner, self.targets[self.level + 1])
        rewind()
        self.level += 1
        self._enforce(masks)

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

    def _needs_dense_gradients(self, time: Timestamp) -> bool:
        return False

    def _read_gradients(self, time: Timestamp) -> None:
        pass

    def _after_update(self, time: Timestamp) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "rows": list(self.rows),
            "targets": list(self.targets),
            "point": None if self.point is None else self.point.state_dict(),
            "position": self.position,
            "metrics": [self._last, self._lowest, self._highest],
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._reset()
        if not state:
            return
        if state["targets"] != self.targets:
            raise ValueError(
                f"what is resumed has levels of densities {state['targets']}, but {self.targets} are given: resume "
                "with the same levels and rate"
            )
        self.level, self.rows, self.position = state["level"], list(state["rows"]), state["position"]
        self._last, self._lowest, self._highest = map(dict, state["metrics"])
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

    def shortfall(self) -> str | None:
        """The level reached, if it is not the last one's end."""
        return None if self.finished else f"level {self.level} of {len(self.targets) - 1}"
