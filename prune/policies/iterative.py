"""Iterative pruning: train, prune what is left, rewind, train again, level after level."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import nn

from prune.masks import Masks
from prune.policies.policy import Moment, Policy
from prune.pruner import Pruner
from prune.rewinding.snapshot import Snapshot
from prune.schedule import geometric, levels_to
from workbench.duration import Duration

_MODEL, _REST = ("weights", "buffers"), ("optimizers", "schedulers", "scaler")
REWINDS = {"all": (*_MODEL, *_REST), "weights": _MODEL, "learning_rate": _REST, "nothing": ()}


@final
class Levels(Policy):
    """The levels of a hunt for a lottery ticket, and how far it is; whoever drives it knows when a level ends.

    Level 0 trains dense. The driver gives :attr:`point` on its way, tells :meth:`note` the metrics of every epoch, and
    at the end of a level calls :meth:`close`, then :meth:`descend` unless :attr:`finished`.

    Args:
        levels: How many times to prune. Or give ``density``.
        rate: Share of the remaining weights pruned at each level, in [0, 1).
        density: Share of the prunable weights to reach, in (0, 1]; gives the number of levels.
        rewind: Where each level after 0 starts: after so many updates ("500it") or epochs ("1ep") of level 0.
        pruner: Which weights go; the smallest of the whole network by default.

    Attributes:
        level: The one that is trained, from 0.
        targets: The density of each level.
        point: What training had at ``rewind``, or None until then.
        place: What the driver has to know to go back there.
        resumed: Whether a state has been loaded since it was last attached.
        stopped: Whether that was the state of a level whose end had been asked for.
        rows: Of every level that has ended, ``level``, ``density``, ``mask_hash``, ``steps`` (updates, from 0 at
            the beginning of level 0), the ``metrics`` at its end, the ``lowest`` and ``highest`` of each over its
            epochs, and what the driver adds.

    Raises:
        ValueError: If arguments are out of range; when attached, if the rewind point is not before the end of a level.

    Warns:
        UserWarning: As :meth:`Policy.attach`.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv:1803.03635; Frankle, Dziugaite, Roy,
    Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671, algorithm 2.
    """

    def __init__(
        self,
        levels: int | None = None,
        rate: float = 0.2,
        density: float | None = None,
        rewind: str | Duration = "1ep",
        pruner: Pruner | None = None,
    ) -> None:
        self.rewind = Duration.parse(rewind)
        super().__init__(self.rewind)
        if (levels is None) == (density is None):
            raise ValueError("give levels (e.g. 10) or density (e.g. 0.1), and only one of them")
        if levels is not None and not isinstance(levels, int):
            raise ValueError(f"levels is {levels!r}: give how many times to prune, an integer such as 10")
        count = levels if levels is not None else levels_to(1.0 if density is None else density, rate)
        self.targets = geometric(rate, count)
        self.pruner = Pruner() if pruner is None else pruner
        self._forget()

    def _forget(self) -> None:
        self.level, self.rows = 0, []  # type: ignore[var-annotated]
        self.point: Snapshot | None = None
        self.place: dict[str, Any] = {}
        self._lowest: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.resumed = self.stopped = False

    @property
    def finished(self) -> bool:
        """Whether the last level has been closed."""
        return len(self.rows) == len(self.targets)

    def note(self, metrics: Mapping[str, float]) -> None:
        """An epoch has ended with these."""
        self._last = {name: float(value) for name, value in metrics.items()}
        for name, value in self._last.items():
            self._lowest[name] = min(self._lowest.get(name, math.inf), value)
            self._highest[name] = max(self._highest.get(name, -math.inf), value)

    def close(self, **more: Any) -> dict[str, Any]:
        """The level has ended: its row, with ``more`` in it.

        Raises:
            ValueError: If it ended before the rewind point.
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

    def descend(self, rewind: Callable[[], Any]) -> None:
        """Prune the network as it is now to the next level's density, ``rewind()``, and enforce the new masks.

        Raises:
            ValueError: If the density cannot be met, or weights are not finite.
        """
        masks = self._choose(self.pruner, self.targets[self.level + 1])
        rewind()
        self.level += 1
        self._enforce(masks)

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.pruner.scope(model)

    def _begin(self, moment: Moment, taken_up: bool) -> None:
        assert self._model is not None, "attached"
        self._check_pruner(self.pruner)
        self.pruner.check(self._model, *self.targets)
        if not (taken_up and (self.resumed or self.finished)):
            self._forget()
            self._enforce(Masks.ones(self._weights))
        self.resumed = False

    def _needs_dense(self, moment: Moment) -> bool:
        return False

    def _observe(self, moment: Moment) -> None:
        pass

    def _advance(self, moment: Moment) -> None:
        pass

    def _progress(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "rows": list(self.rows),
            "targets": list(self.targets),
            "point": None if self.point is None else self.point.state_dict(),
            "place": self.place,
            "noted": [self._last, self._lowest, self._highest],
        }

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        self._forget()
        if not progress:
            return
        if progress["targets"] != self.targets:
            raise ValueError(
                f"what is resumed has levels of densities {progress['targets']}, but {self.targets} are given: resume "
                "with the same levels and rate"
            )
        self.level, self.rows, self.place = progress["level"], list(progress["rows"]), progress["place"]
        self._last, self._lowest, self._highest = map(dict, progress["noted"])
        if progress["point"] is not None:
            self.point = Snapshot()
            self.point.load_state_dict(progress["point"])
        self.resumed, self.stopped = True, progress.get("stopped", False)
        if "lately" in progress:
            self.note(progress["lately"])

    def check_budget(self, updates: float, epochs: float) -> None:
        """Is the rewind point before the end of a level?"""
        budget = updates if self.rewind.unit == "it" else epochs
        if self.rewind.value >= budget:
            raise ValueError(
                f"rewind is {self.rewind}, but a level trains for {budget:g}{self.rewind.unit} only: rewind to an "
                "earlier point"
            )

    def unmet(self) -> str | None:
        """Levels that have not been trained."""
        return None if self.finished else f"level {self.level} of {len(self.targets) - 1}"
