"""Batch order as a pure function of seed and epoch, and a DataLoader that can start at any batch of it."""

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

# DataLoader arguments other than the data set and its order.
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


@final
class EpochIndex(int):
    """The index of a sample, an int, with the epoch in which the sample is drawn.

    A data set with random augmentation reads ``getattr(index, "epoch", None)`` and makes the draw a function of index
    and epoch: it is then the same in any worker, on any rank, in any order, and after resuming in the middle of an
    epoch. Its int attribute ``views`` is the number of different views of a sample, the view of an epoch being
    ``epoch % views``; 0 for a new one every epoch. A data set without that attribute counts as not random.

    Args:
        index: The index.
        epoch: The epoch.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "EpochIndex":
        """The int with its epoch."""
        instance = super().__new__(cls, index)
        instance.epoch = epoch
        return instance

    def __reduce__(self) -> tuple[type["EpochIndex"], tuple[int, int]]:
        return EpochIndex, (int(self), self.epoch)


class EpochOrder(Sampler[int]):
    """Indices of one rank for one epoch: the permutation of (seed, epoch), or 0..n-1 when not shuffled.

    Indices are dealt to the ranks in turn, so that batch i of all ranks together has the samples of batch i of a single
    rank with the global batch size. Every rank has equally many: the tail wraps round to the front, or is dropped. The
    indices are :class:`EpochIndex`, so that the data set knows the epoch in persistent workers too.

    Args:
        size: Samples in the data set.
        seed: Seed of the order.
        shuffle: Whether to permute, anew every epoch.
        rank: Of this process, 0..world - 1.
        world: Number of processes.
        drop_last: Drop the remainder of up to world - 1 samples instead of wrapping.

    Raises:
        ValueError: If the rank is out of range.
    """

    def __init__(
        self, size: int, seed: int, shuffle: bool = True, rank: int = 0, world: int = 1, drop_last: bool = False
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}: ranks count from 0 to {world - 1}")
        self.size, self.seed, self.shuffle, self.rank, self.world = size, seed, shuffle, rank, world
        self.drop_last = drop_last
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world if self.drop_last else -(-self.size // self.world)

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=epoch_generator(self.seed, self.epoch))
        total = len(self) * self.world
        wrapped = order.repeat(-(-total // max(self.size, 1)))[:total]
        epoch = self.epoch
        return (EpochIndex(index, epoch) for index in wrapped[self.rank :: self.world][self.skip :].tolist())


class OrderedLoader(DataLoader):
    """A DataLoader over an :class:`EpochOrder` with a ``state_dict``: the epoch and the number of batches seen.

    Lightning stores it in its checkpoints, so training resumes in the middle of an epoch with the next batch. The
    loader's generator is a function of (seed, epoch) too: making an iterator does not advance torch's global generator.
    It seeds the random numbers of worker processes per epoch, which start anew where an epoch is resumed in its middle;
    a data set whose draws are functions of :class:`EpochIndex` is not affected.
    """

    def __init__(self, dataset: Any, order: EpochOrder, batch_size: int, drop_last: bool, **options: Any) -> None:
        batches = BatchSampler(order, batch_size, drop_last)
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self._order = order
        self._samples_per_batch = batch_size
        self._seen = 0
        self._start: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so this runs at the first batch, after Lightning has called set_epoch.
        start, self._start = self._start, None
        self._seen = start["seen"] if start is not None and start["epoch"] == self._order.epoch else 0
        self.generator.manual_seed(epoch_generator(self._order.seed, self._order.epoch).initial_seed())  # type: ignore[union-attr]
        self._order.skip = self._seen * self._samples_per_batch
        for batch in super().__iter__():
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches seen."""
        return dict(self._start) if self._start else {"epoch": self._order.epoch, "seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start that epoch after that many batches; other epochs start at their first batch."""
        self._start = {"epoch": int(state["epoch"]), "seen": int(state["seen"])}


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator whose seed is a function of (seed, epoch)."""
    # An odd multiplier, so that (seed, epoch) = (0, 1) and (1, 0) do not share an order.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)


def options_of(loader: DataLoader) -> dict[str, Any]:
    """Arguments for another DataLoader like ``loader``, without data set and order."""
    return {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}


def with_epoch_order(loader: Any, seed: int, rank: int = 0, world: int = 1) -> Any:
    """``loader`` with its order made a function of (seed, epoch) and split over the ranks.

    A DataLoader with a plain random or sequential sampler is rebuilt over the same data set. Anything else (an iterable
    data set, a custom sampler or batch sampler) is returned as it is and resumes at the boundaries of epochs only, by
    Lightning's rules. In lists and mappings every loader is treated so.

    Raises:
        ValueError: If there are several ranks and a loader's sampler would give every rank the same samples.
    """
    if isinstance(loader, Mapping):
        return {name: with_epoch_order(each, seed, rank, world) for name, each in loader.items()}
    if isinstance(loader, (list, tuple)):
        return [with_epoch_order(each, seed, rank, world) for each in loader]
    rebuilt = _rebuilt(loader, seed, rank, world)
    if rebuilt is loader and world > 1 and isinstance(loader, DataLoader) and not _splits_over_ranks(loader):
        raise ValueError(
            f"the loader's {type(loader.sampler).__name__} would give each of the {world} processes the same samples: "
            "use a plain sampler, or one that splits them, such as torch's DistributedSampler"
        )
    return rebuilt


def _splits_over_ranks(loader: DataLoader) -> bool:
    """Whether the loader's samplers, or its iterable data set, split samples over processes."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return (
        isinstance(loader, OrderedLoader)
        or isinstance(loader.dataset, IterableDataset)
        or any(hasattr(each, "num_replicas") for each in samplers)
    )


def _rebuilt(loader: Any, seed: int, rank: int, world: int) -> Any:
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    shuffle, sampler = type(loader.sampler) is RandomSampler, loader.sampler
    plain = shuffle or type(sampler) is SequentialSampler
    if not plain or type(loader.batch_sampler) is not BatchSampler:
        return loader
    size = len(loader.dataset)  # type: ignore[arg-type]
    if getattr(sampler, "replacement", False) or len(sampler) != size:  # type: ignore[arg-type]
        return loader
    order = EpochOrder(size, seed, shuffle, rank, world, loader.drop_last)
    return OrderedLoader(loader.dataset, order, loader.batch_size, loader.drop_last, **options_of(loader))
