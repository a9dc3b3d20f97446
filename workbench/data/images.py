"""Labelled images in memory: standardised, augmented, and in batches."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from workbench.data.augment import Augment, augmented, random_bits
from workbench.data.prepared import check_loader_arguments, make_loader
from workbench.data.splits import SPLIT_SEED, stratified_split

Batch = tuple[Tensor, Tensor]


@final
class LabelledImages(Dataset[Batch]):
    """Images held in memory as they were stored; augmented and standardised, (x - mean) / std, a batch at a time.

    Args:
        images: Pixels of any dtype, [N, ...]; [N, C, H, W] to be augmented.
        labels: Classes, [N].
        mean: Mean to subtract; a number, or one for each channel, [C, 1, 1].
        std: Standard deviation to divide by; the same.
        augment: Random change of an image, if any; a function of (seed, view, index) when indexed by
            `workbench.training.order.EpochIndex`, otherwise drawn from torch's global generator.
        views: Number of different views of an image, the view of an epoch being ``epoch % views``; 0 for a new one
            every epoch. Without augmentation the attribute is 1.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: float | Tensor = 0.0,
        std: float | Tensor = 1.0,
        augment: Augment | None = None,
        views: int = 0,
        seed: int = SPLIT_SEED,
    ) -> None:
        self.images, self.labels = images, labels.long()
        self.mean, self.std = mean, std
        self.augment, self.views, self.seed = augment, views if augment else 1, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once: x float32 [B, ...], y int64 [B]."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment:
            images = augmented(images, self.augment, random_bits(indices, self.views, self.seed, 3))
        return (images.float() - self.mean) / self.std, self.labels[chosen]


def channel_scale(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over all pixels, float32 [C, 1, 1] each.

    Summed exactly. A deviation is at least one grey level, so that blank images are not divided by zero.

    Args:
        images: uint8 [N, C, H, W].
    """
    levels = torch.arange(256, dtype=torch.float64)
    scale = []
    for channel in images.transpose(0, 1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = counts @ levels / counts.sum()
        deviation = (counts @ (levels - mean) ** 2 / counts.sum()).sqrt()
        scale.append(torch.stack((mean, deviation.clamp(min=1.0))))
    mean, deviation = torch.stack(scale, 1).float()[..., None, None]
    return mean, deviation


def _as_is(batch: Any) -> Batch:
    return batch


def loader(data: LabelledImages, batch_size: int, num_workers: int, shuffle: bool) -> DataLoader[Batch]:
    """Batches of (x, y), as :func:`workbench.data.prepared.make_loader` makes them."""
    return make_loader(data, batch_size, num_workers, shuffle, _as_is)


class ImageModule(pl.LightningDataModule, ABC):
    """A data module over a training and a test set of labelled images, all in memory; subclasses read them.

    The validation part is cut from the training set, stratified and the same in every run. Batches: x float32
    [B, C, H, W], y int64 [B].

    Training images may be augmented. Their views are functions of (seed, view, index), the view following from the
    epoch, so that a resumed training sees the same images. A finite number of views is the same in every run, as the
    split is, so that a teacher's cached outputs serve any run; with views = 0 the seed is torch's when the loader is
    made, the run's own.

    Args:
        batch_size: Samples in a batch.
        validation: Samples held out from the training set.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        normalize: Standardise each channel by mean and deviation of its pixels in the training part; otherwise scale
            to [0, 1].
        classes: Number of classes.
        augment: What is done to training images, if anything.
        views: Number of different views of a training image; 0 for a new one every epoch.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        batch_size: int,
        validation: int,
        num_workers: int,
        normalize: bool,
        classes: int,
        augment: Augment | None,
        views: int,
    ) -> None:
        super().__init__()
        check_loader_arguments(batch_size, num_workers)
        if validation < 1 or classes < 1:
            raise ValueError(f"validation={validation}, classes={classes}: both must be at least 1.")
        if views < 0:
            raise ValueError(f"views={views}: give a number of views, or 0 for a new one every epoch.")
        if views > 1 and not augment:
            raise ValueError(f"views={views} without augmentation, which makes no difference: set augment as well.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.validation, self.normalize, self.classes = validation, normalize, classes
        self.augment, self.views = augment or None, views
        self.parts: dict[str, LabelledImages] = {}

    @abstractmethod
    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test set: images uint8 [N, C, H, W] of one shape, labels [N] below ``classes``."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W); reads the images if that was not done yet."""
        self.setup()
        return tuple(self.parts["train"].images.shape[1:])

    def setup(self, stage: str | None = None) -> None:
        """Read the images, once."""
        if self.parts:
            return
        (images, labels), test = self.read()
        train, val = map(torch.from_numpy, stratified_split(labels.numpy(), [self.validation], SPLIT_SEED))
        scale = channel_scale(images[train]) if self.normalize else (0.0, 255.0)
        self.parts = {
            "train": LabelledImages(images[train], labels[train], *scale, self.augment, self.views),
            "val": LabelledImages(images[val], labels[val], *scale),
            "test": LabelledImages(*test, *scale),
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training part, shuffled, and augmented if so chosen."""
        self.setup()
        data = self.parts["train"]
        if data.views == 0:
            data = copy.copy(data)
            data.seed = torch.initial_seed()
        return loader(data, self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation part, in order."""
        self.setup()
        return loader(self.parts["val"], self.batch_size, self.num_workers, shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test part, in order."""
        self.setup()
        return loader(self.parts["test"], self.batch_size, self.num_workers, shuffle=False)
