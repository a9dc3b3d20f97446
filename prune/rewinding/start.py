"""Where a training begins, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Where a training begins, part by part: what is rewound, and what is not.

    Args:
        at: The moment of level 0 that counters, schedules and whatever is not named below are taken from: ``"first"``
            before its first update, ``"point"`` the rewind point, ``"end"`` after its last update.
        weights: The network's state dict, if its weights and buffers are not those of that moment.
        optimizer: Whether the optimizer's state is that of that moment; otherwise it starts empty.
        random: Whether random state is that of that moment; otherwise it follows from the training's seed, as the order
            of the data always does.
    """

    at: Literal["first", "point", "end"]
    weights: Mapping[str, Tensor] | None = None
    optimizer: bool = True
    random: bool = True

    def described(self, same_order: bool) -> dict[str, Any]:
        """What was and what was not put back to the moment ``at``, for the record.

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
