"""Data modules that read everything once and keep it in memory, prepared."""

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from workbench.data.images import SPLIT_SEED, check_loader_arguments


class Prepared(Protocol):
    """What a data module made of its files."""

    @property
    def parts(self) -> dict[str, Dataset[Any]]:
        """The data sets train, val and test."""
        ...

    @property
    def collate(self) -> Any:
        """Samples -> batch."""
        ...


PreparedT = TypeVar("PreparedT", bound=Prepared)


class InMemoryDataModule(pl.LightningDataModule, ABC, Generic[PreparedT]):
    """A data module over samples in memory; subclasses say how to read them.

    Args:
        batch_size: Samples in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_loader_arguments(batch_size, num_workers)
        self.batch_size, self.num_workers = batch_size, num_workers
        self._prepared: PreparedT | None = None

    @abstractmethod
    def read(self) -> PreparedT:
        """Read and prepare everything; parts are train, val and test."""

    def setup(self, stage: str | None = None) -> None:
        """Read and prepare, once."""
        if self._prepared is None:
            self._prepared = self.read()

    @property
    def parts(self) -> dict[str, Dataset[Any]]:
        """The data sets train, val and test; read now if that was not done yet."""
        return self._ready.parts

    def train_dataloader(self) -> DataLoader[Any]:
        """The training part, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation part, in order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part, in order."""
        return self._loader("test", shuffle=False)

    @property
    def _ready(self) -> PreparedT:
        self.setup()
        assert self._prepared is not None
        return self._prepared

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            self.parts[part],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=self._ready.collate,
            generator=torch.Generator().manual_seed(torch.initial_seed() if shuffle else SPLIT_SEED),
            persistent_workers=self.num_workers > 0,
        )
