"""What a data set gives: fetched as by a loader, identified by a digest per sample, and refused if random."""

import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from workbench.randomness import same_random_state
from workbench.training.order import EpochIndex

DIGEST = 8
_TRIED, _BLOCK = 16, 2**17


class Identified(Dataset):
    """A data set whose batches come with their indices and, optionally, a digest of every sample.

    Args:
        dataset: With a length, and ``__getitem__`` or ``__getitems__``.
        verify: Whether to compute digests.
    """

    def __init__(self, dataset: Any, verify: bool = True) -> None:
        self.dataset, self.verify = dataset, verify

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def views(self) -> int:
        """Of the data set: how many views there are of a sample."""
        return views_of(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, list[int], Tensor | None]:
        """What the data set gives for the indices, the indices, and digests, uint8 [B, 8]."""
        data = fetch(self.dataset, indices)
        return data, list(indices), digests(data, len(indices)) if self.verify else None


@dataclass(frozen=True)
class Collated:
    """The loader's collate_fn for what :class:`Identified` gives, and what to do with the batch, in the worker.

    Args:
        collate: Of the loader.
        finish: (batch, indices, digests) -> what the loader yields.
    """

    collate: Callable[[Any], Any]
    finish: Callable[[Any, list[int], Tensor | None], Any]

    def __call__(self, fetched: tuple[Any, list[int], Tensor | None]) -> Any:
        """Put a batch together."""
        data, indices, digested = fetched
        return self.finish(self.collate(data), indices, digested)


def check_loader(loader: Any) -> None:
    """Raises: ValueError: unless it is a DataLoader of batches over a data set that is read by index."""
    if isinstance(loader, (list, tuple, Mapping)):
        raise ValueError("there are several loaders: give one DataLoader, with a split of its own each")
    if not isinstance(loader, DataLoader):
        raise ValueError(f"the loader is a {type(loader).__name__}: give a LightningDataModule or a torch DataLoader")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            f"{type(loader.dataset).__name__} cannot be read by index, which identifies a sample: "
            "give a data set with __getitem__ and __len__"
        )
    if loader.batch_sampler is None:
        raise ValueError("the loader does not make batches (batch_size=None): give it a batch_size")


def views_of(dataset: Any) -> int:
    """How many views of a sample the data set has; 0 for a new one every epoch."""
    return getattr(dataset, "views", 1)


def fetch(dataset: Any, indices: Sequence[int]) -> Any:
    """What torch's loader fetches: all at once where the data set can, else a list of samples."""
    together = getattr(dataset, "__getitems__", None)
    return together(list(indices)) if together else [dataset[index] for index in indices]


def digests(data: Any, count: int) -> Tensor:
    """Eight bytes that tell the values of every sample from others: uint8 [count, 8].

    Of a list of samples BLAKE2b of each. Of a batch, sums over the 64-bit words of a row, each mixed with a number of
    its own (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", in Stafford's variant 13): four
    times as fast, and as reliable against accidental changes (not against deliberate collisions).

    Args:
        data: A list of samples, or a batch: a tuple or mapping of tensors, arrays or lists whose rows are the samples.
        count: How many samples there are.
    """
    if isinstance(data, list) and len(data) == count:
        packed = np.frombuffer(b"".join(map(digest, data)), dtype=np.uint8)
    else:
        sums = np.zeros(count, dtype=np.uint64)
        for name, rows in _rows(data, count, ""):
            own = rows if isinstance(rows, np.ndarray) else np.frombuffer(b"".join(map(digest, rows)), dtype=np.uint8)
            sums += _mixed(own.reshape(count, -1), name)
        packed = sums.view(np.uint8)
    return torch.from_numpy(packed.reshape(count, DIGEST).copy())


def digest(value: Any) -> bytes:
    """BLAKE2b of 8 bytes over the values in a sample, or in any nest of mappings, sequences, tensors and scalars."""
    blake = hashlib.blake2b(digest_size=DIGEST)
    _feed(blake, value)
    return blake.digest()


def probe(dataset: Any, collate: Callable[[Any], Any]) -> dict[str, Any]:
    """What the first samples look like, and the batch that is made of them: columns, digests in hexadecimal digits."""
    indices = [EpochIndex(index, 0) for index in range(min(len(dataset), _TRIED))]
    data = fetch(dataset, indices)
    items = digest(digests(data, len(indices))).hex()
    return {"columns": columns_of(dataset), "items": items, "batch": digest(collate(data)).hex()}


def columns_of(dataset: Any) -> list[str] | None:
    """The names in a sample of a data set, sorted; None where samples have no names."""
    first = dataset[EpochIndex(0, 0)] if len(dataset) else None
    return sorted(map(str, first)) if isinstance(first, Mapping) else None


def check_repeatable(dataset: Any, collate: Callable[[Any], Any]) -> None:
    """Read a few samples twice, and let ``collate`` make a batch of them twice.

    Raises:
        ValueError: If they differ, or if the data set has new samples every epoch.
    """
    name, views = type(dataset).__name__, views_of(dataset)
    if type(views) is not int or views < 1:
        raise ValueError(
            f"{name} has views={views!r}, new ones every epoch, and a cache would hold answers to inputs that never "
            "come again: give it a number of views, e.g. views=4"
        )
    step = max(len(dataset) // _TRIED, 1)
    indices = [EpochIndex(index, view % views) for view, index in enumerate(range(0, len(dataset), step))][:_TRIED]
    reads: list[tuple[Tensor, bytes]] = []
    for seed in (1, 2):
        with same_random_state(seed):
            first = digests(fetch(dataset, indices), len(indices))
        # The samples of the first time, so that only the collate_fn can make a difference.
        with same_random_state(3):
            data = fetch(dataset, indices)
        with same_random_state(seed):
            reads.append((first, digest(collate(data))))
    (one, batch), (other, again) = reads
    if changing := [int(index) for index, a, b in zip(indices, one, other) if not torch.equal(a, b)]:
        raise ValueError(
            f"{name} gives another sample {changing[0]} each time, as random augmentation does, and a cache would hold "
            "answers to inputs that never come again: let it draw from (index, index.epoch), see "
            "workbench.training.order.EpochIndex, "
            "and say in an attribute 'views' how many there are; or take the augmentation away"
        )
    if batch != again:
        raise ValueError(
            "the loader's collate_fn makes another batch of the same samples each time, as random masking does: mask "
            "in the data set, as a function of the index, or ask the teacher live"
        )


def tokenizer_digest(*owners: Any) -> str | None:
    """SHA-256 of the first ``tokenizer`` that one of the owners has, without its momentary padding; None without."""
    tokenizer = next((own for owner in owners if (own := getattr(owner, "tokenizer", None)) is not None), None)
    if tokenizer is None:
        return None
    whole = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(whole, "to_str"):
        described = json.loads(whole.to_str())
        # They change with every call.
        described = {name: value for name, value in described.items() if name not in ("truncation", "padding")}
    elif hasattr(tokenizer, "get_vocab"):
        described = tokenizer.get_vocab()
    else:
        described = digest(vars(tokenizer)).hex() if hasattr(tokenizer, "__dict__") else repr(tokenizer)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _rows(value: Any, count: int, name: str) -> Iterator[tuple[str, Any]]:
    """Leaves of a batch, each with a header and what row i of it is."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _rows(each, count, f"{name}.{key}")
    elif isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == count:
        array = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        flat = array.contiguous().reshape(count, -1).view(torch.uint8).numpy()
        yield f"{name}:{array.dtype}{list(array.shape[1:])}", flat
    elif isinstance(value, tuple) or (isinstance(value, list) and len(value) != count):
        for place, each in enumerate(value):
            yield from _rows(each, count, f"{name}.{place}")
    elif isinstance(value, list):
        yield f"{name}:list", value
    else:
        yield f"{name}:all", [value] * count


def _feed(blake: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        blake.update(f"{value.dtype}{list(value.shape)}".encode())
        blake.update(value.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        blake.update(f"{value.dtype}{list(value.shape)}".encode())
        blake.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            blake.update(f"{key!r}:".encode())
            _feed(blake, each)
    elif isinstance(value, (list, tuple)):
        if all(isinstance(each, (int, float, str)) for each in value):
            blake.update(repr(list(value)).encode())
            return
        blake.update(f"[{len(value)}]".encode())
        for each in value:
            _feed(blake, each)
    elif isinstance(value, (int, float, str, bytes, bool, type(None), np.generic)):
        blake.update(repr(value).encode())
    elif hasattr(value, "tobytes"):  # a picture
        blake.update(f"{getattr(value, 'mode', '')}{getattr(value, 'size', '')}".encode())
        blake.update(value.tobytes())
    else:
        blake.update(pickle.dumps(value, protocol=4))


def _mixed(rows: np.ndarray, name: str) -> np.ndarray:
    """A 64-bit number for each row of bytes, uint8 [B, W] -> uint64 [B]; ``name`` decides how."""
    count, width = rows.shape
    numbers = _numbers(name, -(-width // 8))
    sums = np.empty(count, dtype=np.uint64)
    step = max(_BLOCK // max(width, 1), 1)  # so that the passes below find their words in the cache
    for start in range(0, count, step):
        block = rows[start : start + step]
        words = np.pad(block, ((0, 0), (0, -width % 8))) if width % 8 else np.ascontiguousarray(block)
        mixed = words.view(np.uint64) + numbers
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        sums[start : start + step] = mixed.sum(1, dtype=np.uint64)
    return sums


@functools.lru_cache(maxsize=64)
def _numbers(name: str, count: int) -> np.ndarray:
    """Random 64-bit numbers that belong to ``name``; numpy promises that its bit generators' streams stay the same."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.PCG64(seed).random_raw(count)
