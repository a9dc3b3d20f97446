"""Data order as a pure function of seed and epoch, and a loader that can start anywhere in it."""

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

# What a loader is made with besides its data set and its order.
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
class At(int):
    """The index of a sample that also knows its epoch; an int to everybody who does not ask.

    A data set that draws at random reads ``getattr(index, "epoch", None)`` and makes the draw a function of index and
    epoch: it is then the same in any worker, on any rank, in any order, and after resuming in the middle of an epoch.
    Such a data set says in an int attribute ``views`` how many different views of a sample it has, the view of an
    epoch being ``epoch % views``; 0 for a new one every epoch. Without that attribute it counts as not random.

    Args:
        index: The index.
        epoch: The epoch in which it is asked for.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "At":
        """The int with its epoch."""
        made = super().__new__(cls, index)
        made.epoch = epoch
        return made

    def __reduce__(self) -> tuple[type["At"], tuple[int, int]]:
        return At, (int(self), self.epoch)


class EpochOrder(Sampler[int]):
    """Indices of one rank for one epoch: the permutation of (seed, epoch), or 0..n-1 when not shuffled.

    Ranks take turns, so that batch i of all ranks together is the same samples as batch i of one rank whose batch is
    as large as theirs together. Every rank has equally many: the tail wraps round to the front, or is dropped. The
    indices are :class:`At`, so that the data set knows the epoch, in a worker process that outlives it too.

    Args:
        size: Samples in the data set.
        seed: Of the order.
        shuffle: Permute, anew every epoch.
        rank: Of this process, 0..world - 1.
        world: Number of processes.
        drop_last: Drop the up to world - 1 samples that do not go round, instead of wrapping.

    Raises:
        ValueError: If the rank is not one of the world's.
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
            order = torch.randperm(self.size, generator=stream(self.seed, self.epoch))
        total = len(self) * self.world
        around = order.repeat(-(-total // max(self.size, 1)))[:total]
        epoch = self.epoch
        return (At(index, epoch) for index in around[self.rank :: self.world][self.skip :].tolist())


class OrderedLoader(DataLoader):
    """A DataLoader over an :class:`EpochOrder` that knows its place in the epoch and can start from it.

    Lightning stores ``state_dict`` in its checkpoints, so training resumes in the middle of an epoch with the batches
    that had not been seen yet. The loader's own generator is a function of (seed, epoch) too: making an iterator does
    not move torch's global generator. What worker processes draw at random is seeded per epoch by it, and starts anew
    where an epoch is resumed in its middle; a data set whose draws are functions of :class:`At` goes on as if nothing
    had happened.
    """

    def __init__(self, dataset: Any, order: EpochOrder, batch_size: int, drop_last: bool, **options: Any) -> None:
        batches = BatchSampler(order, batch_size, drop_last)
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self._order = order
        self._samples = batch_size
        self._seen = 0
        self._start: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: this runs at the first batch, after Lightning has told the order its epoch.
        start, self._start = self._start, None
        self._seen = start["seen"] if start is not None and start["epoch"] == self._order.epoch else 0
        self.generator.manual_seed(stream(self._order.seed, self._order.epoch).initial_seed())  # type: ignore[union-attr]
        self._order.skip = self._seen * self._samples
        for batch in super().__iter__():
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        return dict(self._start) if self._start else {"epoch": self._order.epoch, "seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start that epoch after that many batches; any other epoch starts at its beginning."""
        self._start = {"epoch": int(state["epoch"]), "seen": int(state["seen"])}


def stream(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that belongs to (seed, epoch) alone."""
    # An odd multiplier keeps neighbouring seeds' epochs apart: (0, 1) and (1, 0) must not share an order.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)


def options_of(loader: DataLoader) -> dict[str, Any]:
    """What ``loader`` was made with besides its data set and its order: arguments for another one."""
    return {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}


def ordered(loader: Any, seed: int, rank: int = 0, world: int = 1) -> Any:
    """``loader`` with its order made a function of (seed, epoch) and split over the ranks.

    A DataLoader with a plain random or sequential sampler is rebuilt over the same data set; anything else (an iterable
    data set, a sampler or batch sampler of the user's own) is returned as it is, and then resumes at epoch boundaries
    only, to which Lightning's own rules apply. Lists and mappings of loaders are looked into.

    Raises:
        ValueError: If there are several ranks and a loader's sampler would give each of them the same samples.
    """
    if isinstance(loader, Mapping):
        return {name: ordered(each, seed, rank, world) for name, each in loader.items()}
    if isinstance(loader, (list, tuple)):
        return [ordered(each, seed, rank, world) for each in loader]
    made = _ordered(loader, seed, rank, world)
    if made is loader and world > 1 and isinstance(loader, DataLoader) and not _splits(loader):
        raise ValueError(
            f"the loader's {type(loader.sampler).__name__} knows nothing of the {world} processes and would give each "
            "of them the same samples: use a plain sampler, or one that splits, such as torch's DistributedSampler"
        )
    return made


def _splits(loader: DataLoader) -> bool:
    """Whether the loader's samplers, or its iterable data set, are made for several processes."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return (
        isinstance(loader, OrderedLoader)
        or isinstance(loader.dataset, IterableDataset)
        or any(hasattr(each, "num_replicas") for each in samplers)
    )


def _ordered(loader: Any, seed: int, rank: int, world: int) -> Any:
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
    kept = options_of(loader)
    return OrderedLoader(loader.dataset, order, loader.batch_size, loader.drop_last, **kept)
