"""The trainings of a level: the ticket, and the controls that it has to beat."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prune.hunting.plan import derived
from prune.hunting.rewinding import REWINDING, Trained
from prune.hunting.store import Store
from prune.hunting.trainee import Arm, Start, Trainee
from prune.pruner import Pruner


@dataclass(frozen=True)
class Hunt:
    """What the arms of a hunt share.

    Args:
        trainee: What is trained.
        pruner: Decides the masks.
        densities: Of each level; the first is 1.
        store: The levels on disk.
        rewinding: A name in ``REWINDING``.
        order: Whether every level sees the data in the same order, or in one of its own.
        controls: Names in ``ARMS`` of what is trained beside the ticket, from level 1 on.
        other: Folder of another hunt, whose masks the control ``other`` has.
        fall: How far below level 0 the validation score may fall before the hunt ends.
        patience: For how many levels in a row.
    """

    trainee: Trainee
    pruner: Pruner
    densities: tuple[float, ...]
    store: Store
    rewinding: str = "all"
    order: Literal["same", "fresh"] = "same"
    controls: tuple[str, ...] = ()
    other: Path | None = None
    fall: float | None = None
    patience: int = 1

    def seed(self, level: int) -> int:
        """Of the data order and everything random at ``level``: the ticket's and its controls' alike."""
        return self.trainee.seed if self.order == "same" or level == 0 else derived(self.trainee.seed, level, "order")


def ticket(hunt: Hunt, level: int) -> Arm:
    """Level 0 is dense; another one prunes the last one's weights and rewinds."""
    if level == 0:
        return Arm(Start("first"), None, hunt.trainee.seed)
    trained = hunt.store.weights(level - 1)
    hunt.trainee.load(trained)
    masks = hunt.trainee.pruned(hunt.pruner, hunt.densities[level], hunt.store.masks(level - 1))
    return Arm(rewound(hunt, trained), masks, hunt.seed(level))


def rewound(hunt: Hunt, trained: Trained) -> Start:
    """Where a level starts whose last one ended with the weights ``trained``."""
    start = REWINDING[hunt.rewinding](trained)
    return start if hunt.order == "same" else replace(start, random=False)


ARMS: dict[str, Callable[[Hunt, int], Arm]] = {"ticket": ticket}
