"""Shapes drawn on noise, to be segmented: made on the spot."""

from typing import final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from workbench.data.images import Batch, LabelledImages, loader
from workbench.data.prepared import check_loader_arguments
from workbench.data.splits import SPLIT_SEED
from workbench.tasks import Segmentation, Task

NAMES = ("ground", "disc", "square", "cross")


@final
class Shapes(pl.LightningDataModule):
    """Discs, squares and crosses on a noisy ground, a class for each pixel; the same images in every run.

    An image has two or three shapes of 3 to 5 pixels' radius at random places, a later one above an earlier one. They
    are brighter than the ground, and only their form tells them apart. Batches: x float32 [B, 1, size, size], about
    standardised; y int64 [B, size, size]: 0 ground, 1 disc, 2 square, 3 cross. Its ``task`` is `Segmentation` of 4
    classes.

    Args:
        batch_size: Images in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fastest for data this small.
        size: Height and width in pixels, at least 16.
        train: Number of images for training.
        val: Number of images for validation.
        test: Number of images for the test.

    Raises:
        ValueError: An argument out of range.
    """

    names = NAMES

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        size: int = 24,
        train: int = 600,
        val: int = 150,
        test: int = 300,
    ) -> None:
        super().__init__()
        check_loader_arguments(batch_size, num_workers)
        if size < 16 or min(train, val, test) < 1:
            raise ValueError(
                f"size={size}, train={train}, val={val}, test={test}: give at least 16 pixels and 1 image."
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.input_shape = (1, size, size)
        self.sizes = {"train": train, "val": val, "test": test}
        self.task: Task = Segmentation(len(NAMES))
        self.parts: dict[str, LabelledImages] = {}

    def setup(self, stage: str | None = None) -> None:
        """Draw the images, once."""
        if not self.parts:
            self.parts = {
                name: LabelledImages(*draw(count, self.input_shape[-1], SPLIT_SEED + part))
                for part, (name, count) in enumerate(self.sizes.items())
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


def draw(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images, float32 [count, 1, size, size], and classes, int64 [count, size, size]: a function of the arguments."""
    random = np.random.RandomState(seed)  # frozen by numpy's policy
    row, column = np.mgrid[:size, :size]
    images = np.zeros((count, 1, size, size), np.float32)
    labels = np.zeros((count, size, size), np.int64)
    for image, label in zip(images[:, 0], labels):
        for _ in range(random.randint(2, 4)):
            shape, radius = random.randint(1, len(NAMES)), random.randint(3, 6)
            y, x = np.abs(row - random.randint(3, size - 3)), np.abs(column - random.randint(3, size - 3))
            inside = {
                1: y**2 + x**2 <= radius**2,
                2: np.maximum(y, x) < radius,
                3: (np.minimum(y, x) < 2) & (np.maximum(y, x) <= radius),
            }[shape]
            image[inside], label[inside] = random.uniform(1, 3), shape
        image += 0.3 * random.standard_normal((size, size)) - 0.5
    return torch.from_numpy(images), torch.from_numpy(labels)
