"""What a pruner is asked with while a network trains: data, and weights that train."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from prune.criteria import Criterion
from prune.pruner import Pruner
from workbench.messages import some

Evidence = Callable[[Criterion], Mapping[str, Any]]


def check_frozen(pruner: Pruner, weights: Mapping[str, nn.Parameter]) -> None:
    """Say which of ``weights`` are frozen, unless ``include`` names them.

    Raises:
        ValueError: If there are such, and the criterion wants their gradient.

    Warns:
        UserWarning: By name, if there are such.
    """
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen and pruner.axes.criterion.needs_loss:
        raise ValueError(
            f"{some(frozen)}: frozen, so criterion '{pruner.axes.criterion.name}' finds no gradient there; exclude it"
        )
    if frozen and not pruner.include:
        warnings.warn(
            f"{some(frozen)}: frozen, and pruned like the others, which no training makes up for: exclude it, or name "
            "it in include",
            stacklevel=5,
        )


def shown(criterion: Criterion, evidence: Evidence | None) -> Mapping[str, Any]:
    """The arguments ``loader`` and ``loss`` of a pruner's call, as far as the criterion needs them.

    Raises:
        ValueError: If it needs them and there is no ``evidence``.
    """
    if not criterion.needs_loader:
        return {}
    if evidence is None:
        raise ValueError(
            f"criterion '{criterion.name}' looks at data, and its policy is shown none: attach it with "
            "evidence=lambda criterion: {'loader': batches, 'loss': loss}, or prune once before, with "
            "Pruner(...)(model, density, loader=..., loss=...), and train under these masks"
        )
    return evidence(criterion)
