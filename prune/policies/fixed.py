"""One mask from the first step to the last."""

import warnings
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from prune.masks import Masks
from prune.masks.enforce import fitting
from prune.policies.moment import Moment
from prune.policies.policy import Policy


@final
class Fixed(Policy):
    """Trains under a fixed mask: pruned weights are zero before the first step and after every one.

    Args:
        masks: Parameter name -> bool tensor, True where the weight is kept.

    Raises:
        ValueError: If the masks are not valid; when attached, if they do not fit; when a state is loaded, if other
            masks are in it.

    Warns:
        UserWarning: By name, when attached, if a mask keeps nothing of a layer.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = self._given = masks if isinstance(masks, Masks) else Masks(masks)

    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return fitting(self._given, model)

    def _begin(self, moment: Moment, taken_up: bool) -> None:
        for name, (kept, total) in self._given.counts().items():
            if not kept:
                warnings.warn(f"layer collapse: '{name}' keeps none of its {total} weights", stacklevel=4)
        if not taken_up:
            self._enforce(self._given)

    def _needs_dense(self, moment: Moment) -> bool:
        return False

    def _observe(self, moment: Moment) -> None:
        pass

    def _advance(self, moment: Moment) -> None:
        pass

    def _progress(self) -> dict[str, Any]:
        return {}

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        if self.masks is not None and self.masks != self._given:
            stored, given = self.masks.hash(), self._given.hash()
            self.masks = self._given
            raise ValueError(
                f"what is resumed was trained under mask {stored[:12]}, but mask {given[:12]} is given: resume with "
                "the same mask, or start anew from its weights"
            )

    def check_budget(self, updates: float, epochs: float) -> None:
        """Any is enough."""

    def unmet(self) -> str | None:
        """Nothing."""
        return None
