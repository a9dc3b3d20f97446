"""What a weight is worth: pure functions that give scores of its shape, higher is kept longer.

Scores are in fp32 whatever the weight is stored in (bf16 has 1,927 distinct magnitudes in a million weights,
so half precision would leave the choice to ties); float64 weights keep float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prune.criteria.activations import wanda
from prune.criteria.flow import synflow
from prune.criteria.gradients import grasp, movement, movement_step, snip, snip_step, taylor, taylor_step
from prune.criteria.weights import magnitude, random, seeded

__all__ = [
    "CRITERIA",
    "Criterion",
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


@dataclass(frozen=True)
class Criterion:
    """A scoring function and what it must be given.

    Attributes:
        name: what it is called in recipes and records.
        score: without data ``score(weight)``, or ``score(weight, generator)`` when ``needs_generator``, returns
            scores of the weight's shape. With it ``score(model, weights, loader)``, or
            ``score(model, weights, loader, loss)`` when ``needs_loss``, returns scores by name; ``weights`` are
            parameters of ``model`` by name, ``loader`` is any iterable of batches, read once, and
            ``loss(model, batch)`` gives a scalar, the mean over the batch. The model is left as it was.
        needs_generator: whether it draws random numbers.
        needs_loader: whether it looks at the whole model and at batches.
        needs_loss: whether it differentiates a loss, too.
        rounds: in how many steps, of equal ratio, a density is reached, with new scores before each.
        online: ``online(weight, grad)``, what one training step adds to the score where it is a sum over steps;
            None where it is not.
    """

    name: str
    score: Callable[..., Any]
    needs_generator: bool = False
    needs_loader: bool = False
    needs_loss: bool = False
    rounds: int = 1
    online: Callable[[Tensor, Tensor], Tensor] | None = None


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", magnitude),
        Criterion("random", random, needs_generator=True),
        Criterion("snip", snip, needs_loader=True, needs_loss=True, online=snip_step),
        Criterion("grasp", grasp, needs_loader=True, needs_loss=True),
        Criterion("synflow", synflow, needs_loader=True, rounds=100),
        Criterion("taylor", taylor, needs_loader=True, needs_loss=True, online=taylor_step),
        Criterion("movement", movement, needs_loader=True, needs_loss=True, online=movement_step),
        Criterion("wanda", wanda, needs_loader=True),
    )
}
