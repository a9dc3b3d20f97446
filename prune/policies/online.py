"""Scores that are sums over training steps."""

# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from prune.criteria.gradients import movement_step, snip_step, taylor_step
from prune.masks.memory import gathered, local, shard
from prune.structures import Layout

Online = Callable[[Tensor, Tensor], Tensor]
Weights = Mapping[str, Tensor]


@final
class OnlineScores:
    """The sum over training steps of what a criterion of gradients adds in each.

    Of single weights every rank sums up its own shard. Of units, gradient times weight is summed over the whole unit
    before the criterion sees it, also where the unit is divided over parameters and ranks.

    Args:
        online: The criterion's.
        weights: Parameters that are scored, by name.
        units: The layout whose units are scored by gates; None to score single weights.
        stored: A :meth:`state` to go on from.
    """

    def __init__(
        self, online: Online, weights: Weights, units: Layout | None = None, stored: Weights | None = None
    ) -> None:
        self._online, self.units = online, units
        self._sums: dict[str, Tensor] = {}
        for name, score in (stored or {}).items():
            self._sums[name] = (score if units is not None else shard(score, weights[name])).clone()

    def add(self, weights: Weights, gradients: Weights) -> None:
        """Add a step's scores to the sums.

        Args:
            weights: Parameters by name; those that are pruned are 0, so their gradients do not count.
            gradients: Finite ones by name, on every rank of the same names.
        """
        grads, values = ([_wide(local(of[name])) for name in gradients] for of in (gradients, weights))
        if not grads:
            return
        if self.units is not None:
            self._add_units(weights, dict(zip(gradients, torch._foreach_mul(grads, values))))
            return
        self._sums |= {name: torch.zeros_like(v) for name, v in zip(gradients, values) if name not in self._sums}
        sums = [self._sums[name] for name in gradients]
        if self._online in _IN_PLACE:
            _IN_PLACE[self._online](sums, list(torch._foreach_mul(grads, values)))
        else:
            torch._foreach_add_(sums, [self._online(value, grad) for value, grad in zip(values, grads)])

    def _add_units(self, weights: Weights, products: dict[str, Tensor]) -> None:
        assert self.units is not None
        whole = {
            name: gathered(products[name], weight) if name in products else torch.zeros_like(local(weight))
            for name, weight in weights.items()
        }
        for key, gate in self.units.pool(whole, form="sum").items():
            added = self._online(torch.ones_like(gate), gate)
            self._sums[key] = self._sums[key].add_(added) if key in self._sums else added

    def arguments(self, weights: Weights) -> dict[str, dict[str, Tensor]]:
        """The arguments of a pruner's call that has these scores; empty before the first step."""
        if self.units is not None or not self._sums:
            return {"unit_scores": dict(self._sums)} if self._sums else {}
        # A weight without any gradient has no sum; it competes with a score of 0.
        zeros = {n: torch.zeros(w.shape, device=w.device) for n, w in weights.items() if n not in self._sums}
        return {"scores": zeros | self._whole(weights)}

    def state(self, weights: Weights) -> dict[str, Tensor]:
        """Copies of the sums on the CPU, of single weights in one piece. Called on every rank."""
        whole = self._sums if self.units is not None else self._whole(weights)
        return {name: score.to("cpu", copy=True) for name, score in whole.items()}

    def _whole(self, weights: Weights) -> dict[str, Tensor]:
        return {name: gathered(part, weights.get(name)) for name, part in self._sums.items()}


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _add_absolute(sums: list[Tensor], products: list[Tensor]) -> None:
    torch._foreach_abs_(products)
    torch._foreach_add_(sums, products)


def _add_squares(sums: list[Tensor], products: list[Tensor]) -> None:
    torch._foreach_mul_(products, products)
    torch._foreach_add_(sums, products)


_IN_PLACE: dict[Online, Callable[[list[Tensor], list[Tensor]], Any]] = {
    snip_step: _add_absolute,
    taylor_step: _add_squares,
    movement_step: torch._foreach_sub_,
}
"""What each adds, of products of gradient and weight: the same numbers, by one call for all weights and in place."""
