"""Criteria: pure functions that score weights; the highest scores are kept.

Scores are in fp32 for weights of any type (bf16 has 1,927 distinct magnitudes in a million weights,
so half precision would leave the choice to ties); float64 weights keep float64.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from prune.criteria.activations import check_inputs, wanda
from prune.criteria.flow import check_products, synflow
from prune.criteria.gradients import grasp, movement, movement_step, snip, snip_step, taylor, taylor_step
from prune.criteria.weights import magnitude, random, seeded

__all__ = [
    "CRITERIA",
    "Criterion",
    "Group",
    "grasp",
    "magnitude",
    "movement",
    "movement_step",
    "random",
    "seeded",
    "snip",
    "snip_step",
    "synflow",
    "taylor",
    "taylor_step",
    "wanda",
]

Group = Literal["mean", "sum"]


@dataclass(frozen=True)
class Criterion:
    """A scoring function and the arguments that it needs.

    Attributes:
        name: its name in recipes and records.
        score: without data ``score(weight)``, or ``score(weight, generator)`` when ``needs_generator``, returns
            scores of the weight's shape. With it ``score(model, weights, loader)``, or
            ``score(model, weights, loader, loss)`` when ``needs_loss``, returns scores by name; ``weights`` are
            parameters of ``model`` by name, ``loader`` is any iterable of batches, read once, and
            ``loss(model, batch)`` gives a scalar, the mean over the batch. The model is left as it was.
        needs_generator: whether it draws random numbers.
        needs_loader: whether it looks at the whole model and at batches.
        needs_loss: whether it also differentiates a loss.
        rounds: number of steps, of equal ratio, to a density, with new scores before each.
        online: ``online(weight, grad)``, what one training step adds to a score that is a sum over steps; None if
            the score is no such sum.
        check: ``check(model, names)`` refuses parameters that it cannot score, before anything is trained; None if it
            scores all.
        group: how a unit of several weights is scored, such as a channel or a head, unless the pruner says otherwise:
            "mean" of its weights' scores, or "sum". With ``gates`` "sum" is the score of a gate that multiplies all
            weights of the unit, a weight of 1 whose gradient is the sum over the unit of gradient times weight;
            without it, the sum of its weights' scores.
        gates: whether ``score`` takes ``units=``, a function that sums values of weights over units, and then returns
            scores of gates by the names that the function returns; ``online(1, sum)`` is then that of a step.
    """

    name: str
    score: Callable[..., Any]
    needs_generator: bool = False
    needs_loader: bool = False
    needs_loss: bool = False
    rounds: int = 1
    online: Callable[[Tensor, Tensor], Tensor] | None = None
    check: Callable[[nn.Module, Collection[str]], None] | None = None
    group: Group = "mean"
    gates: bool = False


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", magnitude),
        Criterion("random", random, needs_generator=True),
        Criterion("snip", snip, needs_loader=True, needs_loss=True, online=snip_step, group="sum", gates=True),
        Criterion("grasp", grasp, needs_loader=True, needs_loss=True),
        Criterion("synflow", synflow, needs_loader=True, rounds=100, check=check_products),
        Criterion("taylor", taylor, needs_loader=True, needs_loss=True, online=taylor_step, group="sum", gates=True),
        Criterion(
            "movement", movement, needs_loader=True, needs_loss=True, online=movement_step, group="sum", gates=True
        ),
        Criterion("wanda", wanda, needs_loader=True, check=check_inputs),
    )
}
