"""What a criterion needs of a training: batches and a loss to calibrate on, and weights that have gradients."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from prune.criteria import Criterion
from prune.pruner import Pruner
from workbench.messages import some

Calibration = Callable[[Criterion, int], Mapping[str, Any]]
"""(criterion, number of batches) -> those of ``loader`` and ``loss`` of a pruner's call that the criterion needs."""


def check_frozen(pruner: Pruner, weights: Mapping[str, nn.Parameter], adapted: bool = False) -> None:
    """Refuse frozen ``weights`` where the criterion needs gradients; warn of others that ``include`` does not name.

    With ``adapted`` there is no warning: adapters that train make up for what is pruned.

    Raises:
        ValueError: If a weight is frozen and the criterion needs its gradient.

    Warns:
        UserWarning: By name, if frozen weights will be pruned.
    """
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen and pruner.axes.criterion.needs_loss:
        raise ValueError(
            f"{some(frozen)}: frozen, so criterion '{pruner.axes.criterion.name}' finds no gradient there; exclude it"
        )
    if frozen and not (pruner.include or adapted):
        warnings.warn(
            f"{some(frozen)}: frozen, and pruned like the others, which no training makes up for: exclude it, or name "
            "it in include",
            stacklevel=5,
        )


def calibrated(criterion: Criterion, batches: int, calibration: Calibration | None) -> Mapping[str, Any]:
    """The arguments ``loader`` and ``loss`` of a pruner's call; empty if the criterion needs no data.

    Raises:
        ValueError: If the criterion needs data and there is no ``calibration``.
    """
    if not criterion.needs_loader:
        return {}
    if calibration is None:
        raise ValueError(
            f"criterion '{criterion.name}' needs data, and its policy has none: attach it with "
            "calibration=lambda criterion, batches: {'loader': first_batches, 'loss': loss}, or prune once before, "
            "with Pruner(...)(model, density, loader=..., loss=...), and train under these masks"
        )
    return calibration(criterion, batches)
