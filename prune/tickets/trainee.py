"""What a hunt trains: the hunt decides from where and under which masks, a trainee knows how to train."""

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
        saves: The checkpoints that it keeps for later levels to start from: ``"point"``, ``"end"``.
    """

    start: Start
    masks: Masks | None
    seed: int
    saves: tuple[str, ...] = ()


class Trainee(ABC):
    """Something that can be trained again and again: a LightningModule with its data, or a function.

    Attributes:
        network: What is pruned and saved.
        seed: Of level 0.
    """

    network: nn.Module
    seed: int

    @abstractmethod
    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        """Train the network in place, or resume a training in ``folder``; save the checkpoints that ``arm`` names.

        Args:
            arm: From where, under which masks.
            folder: Of this training; what it resumes from is in its ``checkpoints``.
            part: Which of how many trainings this is and its label, for a progress bar.
            level: Of the hunt.

        Returns:
            For the record: ``metrics``, ``history``, ``monitor``, ``world_size`` and more.
        """

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Give the network this whole state dict."""

    @abstractmethod
    def select_masks(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """Masks of ``density`` for the network as it is now; a criterion that needs data gets the training data."""

    @abstractmethod
    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """Write the network as a compact checkpoint to ``folder/compact``; adds ``size`` to ``result``."""

    @abstractmethod
    def point_hashes(self) -> dict[str, str]:
        """SHA-256 of the checkpoints of level 0 that later levels start from, by name."""
