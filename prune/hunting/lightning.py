"""A LightningModule with its data module and Trainer as what a hunt trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from prune.callbacks import KeepMasked
from prune.evidence import evidence
from prune.hunting.trainee import Arm, Trainee
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewind import RewindPoint
from workbench.duration import Duration
from workbench.files import sha256
from workbench.module import network_of
from workbench.randomness import same_random_state
from workbench.saving import save_network
from workbench.training import train, training_loader


@final
class LightningTrainee(Trainee):
    """Trains a module in Lightning; moments of level 0 are Lightning's checkpoints.

    Args:
        module: The module.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of level 0.
        rewind: Where the rewind point is.
        folder: Where it is kept.
        checkpoint: How often what a stopped training resumes from is written.
        batches: How many training batches a criterion looks at that looks at data.
        early_stop: After how many validations without a better score a training ends; None trains to the end.
    """

    def __init__(
        self,
        module: LightningModule,
        data: LightningDataModule,
        trainer: Mapping[str, Any] | None,
        seed: int,
        rewind: Duration,
        folder: Path,
        checkpoint: Duration,
        batches: int,
        early_stop: int | None = None,
    ) -> None:
        self.module, self.data, self.trainer, self.seed = module, data, trainer, seed
        self.network = network_of(module)
        self.rewind, self.point = rewind, folder / "rewind.ckpt"
        self.checkpoint, self.batches = checkpoint, batches
        self.early_stop = early_stop

    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        """See :class:`Trainee`."""
        result = train(
            self.module,
            self.data,
            trainer=self.trainer,
            seed=arm.seed,
            out=folder,
            checkpoint=self.checkpoint,
            start=self.point if arm.start.at == "point" else None,
            callbacks=[RewindPoint(self.rewind, self.point) if arm.masks is None else KeepMasked(arm.masks)],
            part=part,
        )
        if not self.point.is_file():
            raise ValueError(f"level 0 was stopped before the rewind point {self.rewind}: rewind to an earlier one")
        del result["masks"]  # level 0 has none, the others the arm's
        return result

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Trainee`."""
        self.network.load_state_dict(weights)

    def pruned(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """See :class:`Trainee`."""
        module, data, seed = self.module, self.data, self.seed
        shown = evidence(pruner.criterion, module, lambda: training_loader(module, data, seed), self.batches, data)
        with same_random_state(seed):
            return pruner(self.network, density, within=within, **shown)

    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """See :class:`Trainee`."""
        save_network(self.module, self.data, folder, result, masks, example=False)

    def points(self) -> dict[str, str]:
        """See :class:`Trainee`."""
        return {"point": sha256(self.point)} if self.point.is_file() else {}
