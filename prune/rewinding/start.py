"""Where a training starts, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Where a training starts, part by part.

    Args:
        at: The checkpoint of level 0 that counters, schedules and all that is not named below are taken from:
            ``"first"`` before its first update, ``"point"`` the rewind point, ``"end"`` after its last update.
        weights: The network's state dict, if its weights and buffers are not the checkpoint's.
        optimizer: Whether the optimizer's state is the checkpoint's; otherwise it starts empty.
        random: Whether random state is the checkpoint's; otherwise it follows from the training's seed, as the order
            of the data always does.
    """

    at: Literal["first", "point", "end"]
    weights: Mapping[str, Tensor] | None = None
    optimizer: bool = True
    random: bool = True

    def described(self, same_order: bool) -> dict[str, Any]:
        """Which parts are as at ``at`` and which are not, for the record.

        Args:
            same_order: Whether the seed, and so the order of the data, is that of level 0.
        """
        parts = {"weights": self.weights is None, "buffers": self.weights is None, "optimizers": self.optimizer}
        parts |= {"schedulers": True, "counters": True, "random state": self.random, "data order": same_order}
        return {
            "at": self.at,
            "rewound": [name for name, back in parts.items() if back],
            "not rewound": [name for name, back in parts.items() if not back],
        }
