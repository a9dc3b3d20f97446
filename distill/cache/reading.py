"""CachedTeacher: a teacher's answers out of a cache, beside the batches that they belong to."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.cache import store as disk
from distill.cache.samples import Collated, Identified, check_loader, probe, tokenizer_digest, views_of
from distill.teacher import Teacher, TeacherSource
from workbench.models.positions import tokens_of
from workbench.training.order import options_of

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class CachedBatch(NamedTuple):
    """A batch and what the teacher says about it.

    Args:
        batch: As the loader makes it.
        cached_targets: By name: ``logits`` [B, ..., C], or where ids were drawn ``ids``, ``weights`` and ``log_probs``
            [B, ..., K] and ``log_z`` [B, ...]; ``feature/<name>``. Zero at padding, where a weight of 0 means no id.
    """

    batch: Any
    cached_targets: dict[str, Tensor]


@final
class CachedTeacher:
    """What a teacher said about a data set, read from the folder that :func:`~distill.cache.cache_teacher` wrote.

    Example:
        >>> for batch, taught in CachedTeacher("runs/cache").attach(loader):   # doctest: +SKIP
        ...     loss = soft_target(student(batch[0]), taught["logits"])

    Args:
        path: That folder, or a finished ``cache`` stage.
        teacher: Whom it must be of; not compared if None.
        verify: Read every shard once, now, to compare its SHA-256, and compare the digest of every sample when it is
            looked up. If False only sizes are checked.

    Raises:
        ValueError: If there is no cache, it is incomplete, damaged, of a newer version or of another teacher.
    """

    def __init__(
        self,
        path: str | Path,
        teacher: Teacher | TeacherSource | Sequence[TeacherSource] | None = None,
        verify: bool = True,
    ) -> None:
        self.path, self.verify = Path(path), verify
        self._splits = {index["split"]: _Split(folder, index, verify) for folder, index in _found(self.path)}
        if not self._splits:
            raise ValueError(f"{path} holds no teacher cache: write one with distill.cache_teacher or a cache stage")
        if teacher is not None:
            asked = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
            given = {"precision": asked.precision, "teacher": asked.fingerprint()}
            for split in self._splits.values():
                split.compare(given)

    @property
    def splits(self) -> list[str]:
        """The splits that it holds."""
        return sorted(self._splits)

    def describe(self, split: str = "train") -> dict[str, Any]:
        """The index of a split, as ``cache.json`` has it: fingerprint, entries, shards."""
        return self._split(split).index

    def attach(self, loader: DataLoader, split: str = "train") -> DataLoader:
        """``loader`` again, in its own order and batches, each with what the teacher says: :class:`CachedBatch`.

        Args:
            loader: A DataLoader over the data set that the teacher was asked about. Its order and the size of its
                batches are free; an index may be a :class:`workbench.training.EpochIndex`, which knows its epoch and
                so its view.
            split: Of the cache.

        Raises:
            ValueError: If the data set, its views, its tokenizer or the collate_fn are others; in reading, if a sample
                is not what the teacher was asked about.
        """
        check_loader(loader)
        if type(loader) is not DataLoader:
            raise ValueError(f"the loader is a {type(loader).__name__}, which cannot be made again: give a DataLoader")
        found = self._split(split)
        given: dict[str, Any] = {"samples": len(loader.dataset), "views": views_of(loader.dataset)}  # type: ignore[arg-type]
        found.compare(given)
        tokenizer = tokenizer_digest(loader.dataset, loader.collate_fn)
        if self.verify:
            found.compare({} if tokenizer is None else {"tokenizer": tokenizer})
            found.compare(probe(loader.dataset, loader.collate_fn))
        options = {
            **options_of(loader),
            "collate_fn": Collated(loader.collate_fn, partial(_with_targets, found)),
            "generator": loader.generator,
        }
        dataset = Identified(loader.dataset, self.verify)
        if loader.batch_size is None:
            return DataLoader(dataset, batch_sampler=loader.batch_sampler, **options)
        return DataLoader(dataset, loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedTeacher":
        return self

    def _split(self, split: str) -> "_Split":
        if split not in self._splits:
            raise ValueError(f"{self.path} has no split {split!r}: it has {', '.join(self.splits)}")
        return self._splits[split]


def open_teacher(source: str | Path, **options: Any) -> Teacher | CachedTeacher:
    """A CachedTeacher of a folder that holds a cache, else a live Teacher, made with ``options``.

    Raises:
        ValueError: If there is neither, or options are given for a cache.
    """
    if isinstance(source, (str, Path)) and next(_folders(Path(source)), None) is not None:
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"{given[0]} is given, but '{source}' is a cache: give it where the cache is made")
        return CachedTeacher(source)
    return Teacher(source, **options)


class _Split:
    """One split of a cache; it can be sent to another process.

    Args:
        folder: Of the split.
        index: Checked.
        verify: Compare SHA-256 now and digests at every look-up.
    """

    def __init__(self, folder: Path, index: dict[str, Any], verify: bool) -> None:
        self.folder, self.index, self.verify = folder, index, verify
        self.entries, self.plan = disk.entries_of(index), disk.plan_of(index)
        self.samples: int = index["fingerprint"]["samples"]
        self.views: int = index["fingerprint"]["views"]
        for known in index["shards"]:
            disk.check_shard(folder, known, thorough=verify)
        self._starts = np.array([part.view * self.samples + part.start for part in self.plan])
        self._open: dict[int, disk.Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def compare(self, given: dict[str, Any]) -> None:
        """Raises: ValueError: if the cache was made with another of the ``given`` parts of a fingerprint."""
        if said := disk.difference(self.index["fingerprint"], given):
            raise ValueError(f"{self.folder} is stale, it was made with {said}: cache again into another folder")

    def look_up(self, indices: Sequence[int], digests: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """What the teacher said about the samples.

        Args:
            indices: Of the samples, which may know their epoch.
            digests: Of the samples, uint8 [B, 8], to compare.
            mask: bool [B, L], where their own positions are to be put.
        """
        places = self._places(indices)
        if digests is not None:
            self._check_digests(indices, digests, places)
        taught: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            if entry.draws:
                taught |= self._drawn(entry, indices, places, mask)
            elif entry.ragged:
                rows = [shard.tensors[name][slice(*shard.span(entry, place))] for shard, place in places.each()]
                taught[name] = _padded(_wide(torch.cat(rows)), self._own(indices, list(map(len, rows)), mask))
            else:
                taught[name] = _wide(places.rows(name))
        return taught

    def _places(self, indices: Sequence[int]) -> "_Places":
        """Where the samples are."""
        if outside := [int(index) for index in indices if not 0 <= index < self.samples]:
            raise ValueError(
                f"{self.folder} has no sample {outside[0]}: it has 0 to {self.samples - 1}; cache again "
                "into another folder"
            )
        views = ((getattr(index, "epoch", None) or 0) % self.views for index in indices)
        ordinals = np.array([view * self.samples + int(index) for view, index in zip(views, indices)])
        numbers = np.searchsorted(self._starts, ordinals, side="right") - 1
        for number in set(numbers.tolist()) - self._open.keys():
            self._open[number] = disk.Shard(self.folder, self.plan[number], self.entries)
        return _Places(self._open, numbers, ordinals - self._starts[numbers])

    def _check_digests(self, indices: Sequence[int], digests: Tensor, places: "_Places") -> None:
        stored = places.rows("digest")
        if not torch.equal(stored, digests):
            row = int((stored != digests).any(1).nonzero()[0])
            raise ValueError(
                f"{self.folder}: sample {int(indices[row])} is not what the teacher was asked about (its digest is "
                f"{bytes(digests[row].tolist()).hex()}, not {bytes(stored[row].tolist()).hex()}): the data, a "
                "transform, the tokenizer or the order of samples changed; cache again into another folder"
            )

    def _own(self, indices: Sequence[int], lengths: list[int], mask: Tensor | None) -> Tensor:
        """The mask, once it is known to fit."""
        if mask is None:
            raise ValueError(f"{self.folder} has samples of several lengths: the batch needs an attention_mask to say")
        for index, length, own in zip(indices, lengths, mask.sum(1).tolist()):
            if length != own:
                raise ValueError(
                    f"{self.folder}: sample {int(index)} has {own} positions in the batch and {length} in the cache: "
                    "truncate as when it was made, or cache again into another folder"
                )
        return mask

    def _drawn(
        self, entry: disk.Entry, indices: Sequence[int], places: "_Places", mask: Tensor | None
    ) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"sizes": [], "ids": [], "counts": [], "log_probs": [], "log_z": []}
        lengths = []
        for shard, place in places.each():
            first, last = shard.span(entry, place)
            lengths.append(last - first)
            cuts = shard.tensors["pointer"][first : last + 1]
            parts["sizes"].append(cuts.diff())
            parts["log_z"].append(shard.tensors["log_z"][first:last])
            for name in ("ids", "counts", "log_probs"):
                parts[name].append(shard.tensors[name][int(cuts[0]) : int(cuts[-1])])
        joined = {name: torch.cat(each) for name, each in parts.items()}
        sizes, ids = joined.pop("sizes"), joined["ids"].long()
        if bool(((ids < 0) | (ids >= entry.classes)).any()):
            raise ValueError(f"{self.folder} is damaged: an id is not below {entry.classes}; cache again")
        filled = torch.arange(int(sizes.max()) if len(sizes) else 0) < sizes[:, None]
        wide = {
            "ids": _padded(ids, filled),
            "weights": _padded(joined["counts"].float() / entry.draws, filled),
            "log_probs": _padded(_wide(joined["log_probs"]), filled),
            "log_z": joined["log_z"],
        }
        if entry.ragged:
            own = self._own(indices, lengths, mask)
            return {name: _padded(value, own) for name, value in wide.items()}
        return {name: value.reshape(len(places), *entry.shape, *value.shape[1:]) for name, value in wide.items()}


def _with_targets(split: _Split, batch: Any, indices: list[int], digests: Tensor | None) -> CachedBatch:
    return CachedBatch(batch, split.look_up(indices, digests, tokens_of(batch)))


class _Places:
    """Where the samples of a batch are: the numbers of their shards, and their places there."""

    def __init__(self, shards: Mapping[int, disk.Shard], numbers: np.ndarray, places: np.ndarray) -> None:
        self._shards, self._numbers, self._places = shards, numbers, places

    def __len__(self) -> int:
        return len(self._places)

    def each(self) -> Iterator[tuple[disk.Shard, int]]:
        """Shard and place of every sample."""
        return ((self._shards[n], place) for n, place in zip(self._numbers.tolist(), self._places.tolist()))

    def rows(self, name: str) -> Tensor:
        """What the samples have one row each of, [B, ...]."""
        used = np.unique(self._numbers).tolist()
        first = self._shards[used[0]].tensors[name]
        if len(used) == 1:
            return first.index_select(0, torch.from_numpy(self._places))
        found = first.new_empty((len(self), *first.shape[1:]))
        for number in used:
            (mine,) = np.nonzero(self._numbers == number)
            own = self._shards[number].tensors[name].index_select(0, torch.from_numpy(self._places[mine]))
            found.index_copy_(0, torch.from_numpy(mine), own)
        return found


def _padded(rows: Tensor, own: Tensor) -> Tensor:
    """The rows at the places that are True in ``own``, in its order; zero elsewhere."""
    found = rows.new_zeros((*own.shape, *rows.shape[1:]))
    found[own] = rows
    return found


def _wide(values: Tensor) -> Tensor:
    return values.to(_WIDE.get(values.dtype, values.dtype))


def _folders(path: Path) -> Iterator[Path]:
    """Folders of splits in ``path``."""
    for root in (path, path / "cache"):
        if (root / disk.INDEX).is_file():
            yield root
        yield from sorted(file.parent for file in root.glob(f"*/{disk.INDEX}"))


def _found(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in _folders(path):
        index = disk.read_index(folder)
        if not index["complete"]:
            there, all_of_them = len(index["shards"]), len(disk.plan_of(index))
            raise ValueError(
                f"{folder} is not complete, it has {there} of {all_of_them} shards: call cache_teacher again as "
                "before, it goes on from there"
            )
        yield folder, index
