"""Data modules that read everything once and keep it in memory."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from workbench.data.splits import SPLIT_SEED

InfoT = TypeVar("InfoT")


@dataclass(frozen=True)
class Prepared(Generic[InfoT]):
    """The data sets that a data module made of its files.

    Args:
        parts: The data sets train, val and test.
        collate: Samples -> batch.
        info: How they were prepared: tokenization of texts, scale of series.
        names: Class names by number, if samples are labelled.
    """

    parts: Mapping[str, Dataset[Any]]
    collate: Any
    info: InfoT
    names: Sequence[str] = ()


def make_loader(data: Dataset[Any], batch_size: int, num_workers: int, shuffle: bool, collate: Any) -> DataLoader[Any]:
    """A plain DataLoader in stored order or, shuffled, in an order given by torch's seed at this call.

    It has its own generator: iterating it does not advance torch's global generator.
    """
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(torch.initial_seed() if shuffle else SPLIT_SEED),
        persistent_workers=num_workers > 0,
    )


def check_loader_arguments(batch_size: int, num_workers: int) -> None:
    """Raise ValueError unless batch_size >= 1 and num_workers >= 0."""
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size}, num_workers={num_workers}: give at least 1 and 0.")


class InMemoryDataModule(pl.LightningDataModule, ABC, Generic[InfoT]):
    """A data module over samples in memory; subclasses define how to read them.

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
        self._prepared: Prepared[InfoT] | None = None

    @abstractmethod
    def read(self) -> Prepared[InfoT]:
        """Read and prepare all parts."""

    def setup(self, stage: str | None = None) -> None:
        """Read and prepare all parts, once."""
        if self._prepared is None:
            self._prepared = self.read()

    @property
    def parts(self) -> Mapping[str, Dataset[Any]]:
        """The data sets train, val and test; read now if necessary."""
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
    def _ready(self) -> Prepared[InfoT]:
        self.setup()
        assert self._prepared is not None
        return self._prepared

    def _loader(self, part: str, shuffle: bool) -> DataLoader[Any]:
        return make_loader(self.parts[part], self.batch_size, self.num_workers, shuffle, self._ready.collate)
