"""What a hunt trains, and from where: the hunt says what, a trainee knows how."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.start import Start


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
        """Write the network as a compact checkpoint to ``folder/compact``; adds ``size`` to ``result``."""

    @abstractmethod
    def points(self) -> dict[str, str]:
        """SHA-256 of the moments of level 0 that later levels start from, by name."""
