"""CachedTeacher: reads cached targets and attaches them to the batches of a loader."""

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
    """A batch and its cached targets.

    Args:
        batch: The loader's own batch.
        cached_targets: By name: ``logits`` [B, ..., C], or for sampled ids ``ids``, ``weights`` and ``log_probs``
            [B, ..., K] and ``log_z`` [B, ...]; ``feature/<name>``. Zero at padding; a weight of 0 means no id.
    """

    batch: Any
    cached_targets: dict[str, Tensor]


@final
class CachedTeacher:
    """Cached targets of a data set, from the folder that :func:`~distill.cache.cache_teacher` wrote.

    Example:
        >>> for batch, targets in CachedTeacher("runs/cache").attach(loader):   # doctest: +SKIP
        ...     loss = soft_target(student(batch[0]), targets["logits"])

    Args:
        path: That folder, or a finished ``cache`` stage.
        teacher: The teacher that the cache must be of; not compared if None.
        verify: Read every shard once, now, to compare its SHA-256, and compare the digest of every sample at every
            look-up. If False, only sizes are checked.

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
        self._splits = {index["split"]: _Split(folder, index, verify) for folder, index in _complete_indices(self.path)}
        if not self._splits:
            raise ValueError(f"{path} holds no teacher cache: write one with distill.cache_teacher or a cache stage")
        if teacher is not None:
            live = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
            fingerprint = {"precision": live.precision, "teacher": live.fingerprint()}
            for split in self._splits.values():
                split.compare(fingerprint)

    @property
    def splits(self) -> list[str]:
        """The cached splits."""
        return sorted(self._splits)

    def columns(self, split: str = "train") -> list[str] | None:
        """The columns of the data set that was cached; None where its samples have no names."""
        return self._split(split).index["fingerprint"].get("columns")

    def describe(self, split: str = "train") -> dict[str, Any]:
        """The index of a split: fingerprint, entries and shards, as in ``cache.json``."""
        return self._split(split).index

    def attach(self, loader: DataLoader, split: str = "train") -> DataLoader:
        """A loader of the same batches in the same order, each with its cached targets, as :class:`CachedBatch`.

        Args:
            loader: A DataLoader over the data set that was cached. Its order and the size of its
                batches are free; an index may be a :class:`workbench.training.EpochIndex`, which knows its epoch and
                so its view.
            split: Of the cache.

        Raises:
            ValueError: If the data set, its views, its tokenizer or the collate_fn differ; in reading, if a sample
                differs from the cached one.
        """
        check_loader(loader)
        if type(loader) is not DataLoader:
            raise ValueError(f"the loader is a {type(loader).__name__}, which cannot be made again: give a DataLoader")
        cached = self._split(split)
        fingerprint: dict[str, Any] = {"samples": len(loader.dataset), "views": views_of(loader.dataset)}  # type: ignore[arg-type]
        cached.compare(fingerprint)
        tokenizer = tokenizer_digest(loader.dataset, loader.collate_fn)
        if self.verify:
            cached.compare({} if tokenizer is None else {"tokenizer": tokenizer})
            cached.compare(probe(loader.dataset, loader.collate_fn))
        options = {
            **options_of(loader),
            "collate_fn": Collated(loader.collate_fn, partial(_with_targets, cached)),
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
    """A CachedTeacher if ``source`` is a folder with a cache, else a live Teacher with ``options``.

    Raises:
        ValueError: If there is neither, or options are given for a cache.
    """
    if isinstance(source, (str, Path)) and next(_folders(Path(source)), None) is not None:
        if set_options := [name for name, value in options.items() if value]:
            raise ValueError(f"{set_options[0]} is given, but '{source}' is a cache: give it where the cache is made")
        return CachedTeacher(source)
    return Teacher(source, **options)


class _Split:
    """One split of a cache. It can be pickled: worker processes open the shards themselves.

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
        for shard in index["shards"]:
            disk.check_shard(folder, shard, thorough=verify)
        self._starts = np.array([part.view * self.samples + part.start for part in self.plan])
        self._open: dict[int, disk.Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def compare(self, fingerprint: dict[str, Any]) -> None:
        """Raises: ValueError: if one of the parts of ``fingerprint`` differs from what is stored."""
        if difference := disk.difference(self.index["fingerprint"], fingerprint):
            raise ValueError(f"{self.folder} is stale, it was made with {difference}: cache again into another folder")

    def look_up(self, indices: Sequence[int], digests: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """The cached targets of the samples.

        Args:
            indices: Of the samples; an EpochIndex knows its epoch and so its view.
            digests: Of the samples, uint8 [B, 8], to compare.
            mask: bool [B, L], False at padding.
        """
        places = self._locate(indices)
        if digests is not None:
            self._check_digests(indices, digests, places)
        targets: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            if entry.draws:
                targets |= self._sampled(entry, indices, places, mask)
            elif entry.ragged:
                rows = [shard.tensors[name][slice(*shard.span(entry, place))] for shard, place in places.each()]
                targets[name] = _padded(_wide(torch.cat(rows)), self._checked_mask(indices, list(map(len, rows)), mask))
            else:
                targets[name] = _wide(places.rows(name))
        return targets

    def _locate(self, indices: Sequence[int]) -> "_Locations":
        """Shard and row of each sample."""
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
        return _Locations(self._open, numbers, ordinals - self._starts[numbers])

    def _check_digests(self, indices: Sequence[int], digests: Tensor, places: "_Locations") -> None:
        stored = places.rows("digest")
        if not torch.equal(stored, digests):
            row = int((stored != digests).any(1).nonzero()[0])
            raise ValueError(
                f"{self.folder}: sample {int(indices[row])} is not what was cached (its digest is "
                f"{bytes(digests[row].tolist()).hex()}, not {bytes(stored[row].tolist()).hex()}): the data, a "
                "transform, the tokenizer or the order of samples changed; cache again into another folder"
            )

    def _checked_mask(self, indices: Sequence[int], lengths: list[int], mask: Tensor | None) -> Tensor:
        """The mask, checked against the cached lengths."""
        if mask is None:
            raise ValueError(f"{self.folder} has samples of several lengths: the batch needs an attention_mask to say")
        for index, length, positions in zip(indices, lengths, mask.sum(1).tolist()):
            if length != positions:
                raise ValueError(
                    f"{self.folder}: sample {int(index)} has {positions} positions in the batch and {length} in the "
                    "cache: truncate as when it was made, or cache again into another folder"
                )
        return mask

    def _sampled(
        self, entry: disk.Entry, indices: Sequence[int], places: "_Locations", mask: Tensor | None
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
            own = self._checked_mask(indices, lengths, mask)
            return {name: _padded(value, own) for name, value in wide.items()}
        return {name: value.reshape(len(places), *entry.shape, *value.shape[1:]) for name, value in wide.items()}


def _with_targets(split: _Split, batch: Any, indices: list[int], digests: Tensor | None) -> CachedBatch:
    return CachedBatch(batch, split.look_up(indices, digests, tokens_of(batch)))


class _Locations:
    """Where the samples of a batch are: the numbers of their shards, and their rows there."""

    def __init__(self, shards: Mapping[int, disk.Shard], numbers: np.ndarray, rows: np.ndarray) -> None:
        self._shards, self._numbers, self._rows = shards, numbers, rows

    def __len__(self) -> int:
        return len(self._rows)

    def each(self) -> Iterator[tuple[disk.Shard, int]]:
        """Shard and row of every sample."""
        return ((self._shards[n], place) for n, place in zip(self._numbers.tolist(), self._rows.tolist()))

    def rows(self, name: str) -> Tensor:
        """A tensor with one row a sample, [B, ...]."""
        used = np.unique(self._numbers).tolist()
        first = self._shards[used[0]].tensors[name]
        if len(used) == 1:
            return first.index_select(0, torch.from_numpy(self._rows))
        gathered = first.new_empty((len(self), *first.shape[1:]))
        for number in used:
            (at,) = np.nonzero(self._numbers == number)
            rows = self._shards[number].tensors[name].index_select(0, torch.from_numpy(self._rows[at]))
            gathered.index_copy_(0, torch.from_numpy(at), rows)
        return gathered


def _padded(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows, in order, where ``mask`` is True; zero elsewhere."""
    padded = rows.new_zeros((*mask.shape, *rows.shape[1:]))
    padded[mask] = rows
    return padded


def _wide(values: Tensor) -> Tensor:
    return values.to(_WIDE.get(values.dtype, values.dtype))


def _folders(path: Path) -> Iterator[Path]:
    """Folders of splits in ``path``."""
    for root in (path, path / "cache"):
        if (root / disk.INDEX).is_file():
            yield root
        yield from sorted(file.parent for file in root.glob(f"*/{disk.INDEX}"))


def _complete_indices(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in _folders(path):
        index = disk.read_index(folder)
        if not index["complete"]:
            there, all_of_them = len(index["shards"]), len(disk.plan_of(index))
            raise ValueError(
                f"{folder} is not complete, it has {there} of {all_of_them} shards: call cache_teacher again as "
                "before, it goes on from there"
            )
        yield folder, index
