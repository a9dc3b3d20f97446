"""What a hunt trains, and from where: the hunt says what, a trainee knows how."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from prune.masks import Masks
from prune.pruner import Pruner


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


@dataclass(frozen=True)
class Arm:
    """One training of a hunt: a level of the ticket, or a control beside it.

    Args:
        start: Where it begins.
        masks: What stays at zero; None for a dense one.
        seed: Of its data order and of everything random in it.
        leaves: The moments that it keeps for later ones to start from: ``"point"``, ``"end"``.
    """

    start: Start
    masks: Masks | None
    seed: int
    leaves: tuple[str, ...] = ()


class Trainee(ABC):
    """Something that can be trained again and again: a LightningModule with its data, or a function.

    Attributes:
        network: What is pruned, and shipped.
        seed: Of level 0.
    """

    network: nn.Module
    seed: int

    @abstractmethod
    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        """Train the network in place, resuming what was begun in ``folder``; it leaves the moments that ``arm`` says.

        Args:
            arm: From where, under which masks.
            folder: Of this training; what it resumes from is in its ``checkpoints``.
            part: Which of how many trainings this is and its label, for a progress bar.
            level: Of the hunt.

        Returns:
            ``metrics``, ``history``, ``monitor``, ``world_size`` and whatever else belongs into the record.
        """

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Give the network this whole state dict."""

    @abstractmethod
    def pruned(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """Masks of ``density`` for the network as it is now; criteria that look at data are shown the training data."""

    @abstractmethod
    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """Write the network as a compact checkpoint to ``folder/artifact``; adds ``size`` to ``result``."""

    @abstractmethod
    def points(self) -> dict[str, str]:
        """SHA-256 of the moments of level 0 that later levels start from, by name."""
