"""Pairs of the bundled digits, with labels that are a yes or no each."""

from typing import Literal, final, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from workbench.data.digits import TEST, VALIDATION, digits
from workbench.data.images import Batch, LabelledImages, loader
from workbench.data.prepared import check_loader_arguments
from workbench.data.splits import SPLIT_SEED, stratified_split
from workbench.tasks import Binary, MultiLabel, Task

Target = Literal["digits", "larger"]
_PARTNERS = 2


@final
class DigitPairs(pl.LightningDataModule):
    """Two of the bundled digits side by side: 2514 pairs for training, 360 for validation, 720 for the test.

    The digits of a part are those of the same part of `Digits`, each the left one of two pairs; the partners are the
    same in every run. Batches: x float32 [B, 128], or [B, 1, 8, 16] for images; y int64 [B, 10], 1 at the digits that
    are there, for the task `MultiLabel`, or [B], 1 where the left one is larger, for `Binary`. Pixels are standardised
    by the one mean and deviation of all training pixels.

    Args:
        target: "digits", which digits are there, or "larger", whether the left one is larger.
        batch_size: Samples in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fastest for data this small.
        image: Whether x is an image, for convolutions, or flat.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self, target: Target = "digits", batch_size: int = 64, num_workers: int = 0, image: bool = False
    ) -> None:
        super().__init__()
        check_loader_arguments(batch_size, num_workers)
        if target not in get_args(Target):
            raise ValueError(f"target={target!r}: choose from {', '.join(get_args(Target))}.")
        self.target: Target = target
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.input_shape = (1, 8, 16) if image else (128,)
        self.task: Task = MultiLabel(10) if target == "digits" else Binary()
        self.parts: dict[str, LabelledImages] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the digits and pair them, once."""
        if self.parts:
            return
        images, labels = digits()
        split = stratified_split(labels.numpy(), [VALIDATION, TEST], SPLIT_SEED)
        pairs = {name: _paired(images[part], labels[part]) for name, part in zip(("train", "val", "test"), split)}
        pixels = pairs["train"][0].double()
        mean, std = float(pixels.mean()), float(pixels.std(correction=0))
        self.parts = {
            name: LabelledImages(x.reshape(-1, *self.input_shape), self._labels(left, right), mean, std)
            for name, (x, left, right) in pairs.items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training part, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation part, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test part, in order."""
        return self._loader("test")

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Batch]:
        self.setup()
        return loader(self.parts[part], self.batch_size, self.num_workers, shuffle)

    def _labels(self, left: Tensor, right: Tensor) -> Tensor:
        if self.target == "larger":
            return (left > right).long()
        return torch.zeros(len(left), 10, dtype=torch.int64).scatter_(1, torch.stack((left, right), 1), 1)


def _paired(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs [2 N, 1, 8, 16] and the digits on the left and on the right, [2 N]."""
    random = np.random.RandomState(SPLIT_SEED)
    left = torch.arange(len(labels)).repeat(_PARTNERS)
    right = torch.cat([torch.from_numpy(random.permutation(len(labels))) for _ in range(_PARTNERS)])
    return torch.cat((images[left], images[right]), -1), labels[left], labels[right]
