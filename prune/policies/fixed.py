"""One mask from the first step to the last."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from prune.masks.enforce import masked_parameters
from prune.masks.load import masks_of
from prune.policies.policy import Policy
from prune.policies.timestamp import Timestamp
from prune.pruner.norms import check_kept
from workbench.models.matrices import matrices


@final
class Fixed(Policy):
    """Trains under a fixed mask: pruned weights are zero before the first step and after every one.

    Args:
        masks: Parameter name -> bool tensor, True where the weight is kept; or the path of a file that ``Masks.save``
            wrote, or of a compact checkpoint.

    Raises:
        ValueError: If the masks are not valid; when attached, if they do not fit, or leave an output of a layer under
            ``weight_norm`` without weights, which makes it NaN; when a state is loaded, if other masks are in it.

    Warns:
        UserWarning: By name, when attached, if a mask keeps nothing of a layer.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        super().__init__()
        self.starts_dense = False
        self.masks = self._fixed = masks_of(masks)

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return masked_parameters(self._fixed, model)

    def _start(self, time: Timestamp, resumed: bool) -> None:
        assert self._model is not None, "attached"
        # By parameter: masks may be named after a model in another wrapper.
        of_layers = {id(matrix.parameter): matrix for matrix in matrices(self._model).values()}
        found = {name: of_layers[id(weight)] for name, weight in self._weights.items() if id(weight) in of_layers}
        check_kept(found, self._fixed)
        for name, (kept, total) in self._fixed.counts().items():
            if not kept:
                warnings.warn(f"layer collapse: '{name}' keeps none of its {total} weights", stacklevel=4)
        if not resumed:
            self._enforce(self._fixed)

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        if self.masks is not None and self.masks != self._fixed:
            stored, fixed = self.masks.hash(), self._fixed.hash()
            self.masks = self._fixed
            raise ValueError(
                f"what is resumed was trained under mask {stored[:12]}, but mask {fixed[:12]} is given: resume with "
                "the same mask, or start anew from its weights"
            )

    def check_budget(self, updates: float, epochs: float) -> None:
        """Any length is enough."""

    def at_final_density(self) -> bool:
        """Always."""
        return True

    def shortfall(self) -> str | None:
        """None: a fixed mask is complete at once."""
        return None
