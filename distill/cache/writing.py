"""cache_teacher: runs a teacher once on every sample of a data set and stores its outputs."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from distill.cache import store as disk
from distill.cache.answers import TargetExtractor, join
from distill.cache.samples import (
    Collated,
    Identified,
    check_loader,
    check_repeatable,
    digest,
    digests,
    fetch,
    probe,
    tokenizer_digest,
    views_of,
)
from distill.teacher import Teacher, TeacherSource
from workbench import progress
from workbench.tasks import Task
from workbench.training.order import EpochIndex, options_of

Store = Literal["full", "sampled"]
_SHARD_BYTES = 64 * 2**20
_STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}
_TRIED = 16


@dataclass(frozen=True)
class CacheSummary:
    """What a call of :func:`write` wrote.

    Args:
        folder: Of the split.
        samples: Number of samples.
        views: Number of views of each.
        bytes: On disk, index included.
        written: Bytes of the shards written by this call.
        reused: Number of shards of an earlier call.
        seconds: Duration of this call.
    """

    folder: Path
    samples: int
    views: int
    bytes: int
    written: int
    reused: int
    seconds: float


def cache_teacher(
    teacher: Teacher | TeacherSource | Sequence[TeacherSource],
    data: LightningDataModule | DataLoader,
    path: str | Path,
    split: str = "train",
    *,
    features: Sequence[str] = (),
    store: Store = "full",
    samples: int = 64,
    dtype: str | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    task: Task | None = None,
    device: str | torch.device | None = None,
) -> Path:
    """Run ``teacher`` once on every sample of a split and store its outputs in ``path/split``.

    The data set is read in the order of its indices, view by view, with the loader's collate_fn. A last batch that is
    smaller is filled up with samples that are there already: a row's last bits depend on the size of its batch (by 2e-6
    in a 784-1200-1200-10 MLP on CPU). Where the kernels round a row alike at every place of a batch, as they do for
    layers of usual width, a student trained from the cache in batches of this size, samples having one length, ends
    with the same weights as with the live teacher, bit for bit.

    A call that was interrupted resumes: whole shards are checked and kept.

    Args:
        teacher: A Teacher, or its source.
        data: A data module, or a DataLoader. Its order does not matter.
        path: The folder for :class:`~distill.cache.CachedTeacher`, with one folder a split.
        split: "train", "val" or "test"; for a DataLoader any name.
        features: Layers whose inputs or outputs are stored too, as :func:`distill.features.capture` takes them.
        store: "full" stores all logits; "sampled", for large vocabularies, ids sampled from them with exact
            log-probabilities and log Z (see :mod:`distill.cache.sampling`).
        samples: How many ids are sampled at each position.
        dtype: Of the stored values, e.g. "float16"; the teacher's own if None. Read back as at least float32.
        shard_size: Samples in a shard, rounded up to whole batches; about 64 MiB if None.
        batch_size: The loader's if None.
        seed: Of the sampled ids.
        task: Says what of a batch the teacher gets. If None, a mapping by keyword without ``label`` and ``labels``, of
            a tuple all but the last. What comes back is a tensor, or has ``logits``; these are kept as they are, so
            ``task.output`` applies to cached outputs as it does to a live teacher's; ids are drawn from the
            task's ``vocabulary``, if it has one, rather than from all rows of a padded lm head.
        device: Where the teacher runs; if None, an accelerator if there is one.

    Returns:
        ``path``.

    Raises:
        ValueError: If the data set or the collate_fn is random, cannot be read by index, or the data module changes
            batches on their way to the device; if the folder holds something else: the cache of another teacher,
            transform, tokenizer, dtype; in reading, if the teacher's output has no row a sample, or does not fit into
            ``dtype``.
    """
    write(
        teacher,
        data,
        path,
        split,
        features=features,
        store=store,
        samples=samples,
        dtype=dtype,
        shard_size=shard_size,
        batch_size=batch_size,
        seed=seed,
        task=task,
        device=device,
    )
    return Path(path)


def write(
    teacher: Teacher | TeacherSource | Sequence[TeacherSource],
    data: LightningDataModule | DataLoader,
    path: str | Path,
    split: str = "train",
    *,
    features: Sequence[str] = (),
    store: Store = "full",
    samples: int = 64,
    dtype: str | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    task: Task | None = None,
    device: str | torch.device | None = None,
) -> CacheSummary:
    """:func:`cache_teacher`, returning a summary."""
    start = time.monotonic()
    _check_options(store, samples, dtype, shard_size, batch_size)
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    source = _Source(data, split, batch_size)
    extract = TargetExtractor(
        teacher,
        features=tuple(features),
        task=task,
        device=_device(device),
        draws=samples if store == "sampled" else 0,
        dtype=dtype,
        seed=seed,
    )
    batch, indices, digested = source.first()
    targets = extract(batch, source.batch_size)
    entries = extract.entries(targets)
    packed = extract.pack(targets, indices, digested, entries)
    fingerprint = {**extract.fingerprint(), **source.fingerprint}
    if _has_functions(teacher):
        fingerprint["answers"] = digest(targets.values).hex()
    size = _shard_size(shard_size, packed, source.batch_size)
    folder = Path(path) / split
    index = _open_index(folder, split, fingerprint, entries, size)
    plan, kept = (
        disk.plan_of(index),
        {listed["file"]: listed for listed in index["shards"] if _is_whole(folder, listed)},
    )
    _check_unchanged(folder, source, [part for part in plan if part.file in kept], entries)
    reused, todo = len(kept), [part for part in plan if part.file not in kept]
    with _progress_bar(f"cache {split}"):
        rate = _Throughput(sum(map(len, plan)), sum(map(len, plan)) - sum(map(len, todo)))
        for part, batches in source.read(todo):
            pieces = []
            for indices, digested, batch in batches:
                targets = extract(batch, source.batch_size)
                pieces.append(extract.pack(targets, indices, digested, entries))
                rate.add(len(indices), _bytes(pieces[-1]))
            kept[part.file] = disk.write_shard(folder / part.file, join(pieces))
            disk.write_index(folder, {**index, "shards": [kept[name] for name in sorted(kept)], "complete": False})
    shards = [kept[part.file] for part in plan]
    disk.write_index(folder, {**index, "shards": shards, "complete": True})
    _remove_temporaries(folder)
    total = sum(shard["bytes"] for shard in shards) + (folder / disk.INDEX).stat().st_size
    fresh = sum(kept[part.file]["bytes"] for part in todo)
    return CacheSummary(folder, source.size, source.views, total, fresh, reused, time.monotonic() - start)


class _Source:
    """Reads the data set of a split in the order of its indices.

    Args:
        data: A data module or a loader.
        split: Of the data module.
        batch_size: The loader's if None.
    """

    def __init__(self, data: Any, split: str, batch_size: int | None) -> None:
        self.loader = loader_of(data, split)
        check_loader(self.loader)
        self.dataset: Any = self.loader.dataset
        self.collate: Callable[[Any], Any] = self.loader.collate_fn
        self.size = len(self.dataset)
        if self.size == 0:
            raise ValueError(f"the {split} split is empty: there is no input for a teacher")
        size = batch_size or self.loader.batch_size or getattr(self.loader.batch_sampler, "batch_size", None)
        if not isinstance(size, int):
            kind = type(self.loader.batch_sampler).__name__
            raise ValueError(f"the loader's {kind} has no batch size: give batch_size")
        self.batch_size = size
        check_repeatable(self.dataset, self.collate)
        self.views = views_of(self.dataset)
        self.fingerprint = {
            "samples": self.size,
            "views": self.views,
            "tokenizer": tokenizer_digest(data, self.dataset, self.collate),
            "batch_size": size,
            **probe(self.dataset, self.collate),
        }

    def first(self) -> tuple[Any, list[int], Tensor]:
        """The first batch, its indices and digests."""
        [(chosen, rows)] = self._batches(disk.Part(0, 0, 0, min(self.batch_size, self.size)))
        data = fetch(self.dataset, rows)
        return self.collate(data), chosen, digests(data, len(rows))

    def read(self, parts: Sequence[disk.Part]) -> Iterator[tuple[disk.Part, Iterator[tuple[list[int], Tensor, Any]]]]:
        """For each part its batches: indices, digests, and the batch with the last one filled up."""
        if not parts:
            return
        batches = {part: list(self._batches(part)) for part in parts}
        read = iter(
            DataLoader(
                Identified(self.dataset),
                batch_sampler=[rows for part in parts for _, rows in batches[part]],  # type: ignore[arg-type]
                generator=torch.Generator(),  # making an iterator draws a seed: not from the global state
                **{
                    **options_of(self.loader),
                    "collate_fn": Collated(self.collate, _with_digests),
                    "pin_memory": False,
                    "persistent_workers": False,
                },
            )
        )
        for part in parts:
            yield part, ((chosen, *next(read)) for chosen, _ in batches[part])

    def digests(self, indices: Sequence[int]) -> Tensor:
        """Of these samples, as they are now."""
        return digests(fetch(self.dataset, indices), len(indices))

    def _batches(self, part: disk.Part) -> Iterator[tuple[list[int], list[int]]]:
        """The indices of a batch, and these filled up to a whole batch from the front."""
        for start in range(part.start, part.stop, self.batch_size):
            chosen = [EpochIndex(i, part.view) for i in range(start, min(start + self.batch_size, part.stop))]
            yield list(chosen), [chosen[i % len(chosen)] for i in range(self.batch_size)]


def loader_of(data: Any, split: str) -> Any:
    """The loader of a split of a data module, which is set up for it; or the given loader."""
    if not isinstance(data, LightningDataModule):
        return data
    if split not in _STAGES:
        raise ValueError(f"split is {split!r}: a data module has {', '.join(_STAGES)}")
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if is_overridden(name, data, LightningDataModule):
            raise ValueError(
                f"{type(data).__name__} changes batches in {name}, where the teacher does not run: do that in the data "
                "set or in collate_fn, or use a live teacher"
            )
    data.prepare_data()
    data.setup(_STAGES[split])
    return getattr(data, f"{split}_dataloader")()


class _Throughput:
    """Shows samples done, bytes, and bytes a second in the progress bar."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.bytes, self.began = total, done, 0, time.monotonic()

    def add(self, samples: int, size: int) -> None:
        """Count a batch."""
        self.done += samples
        self.bytes += size
        rate = self.bytes / max(time.monotonic() - self.began, 1e-9)
        progress.update(self.done, self.total, f"{mebibytes(self.bytes)}, {mebibytes(rate)}/s")


def mebibytes(size: float) -> str:
    """A size as text: ``12.3 MiB``."""
    return f"{size / 2**20:,.1f} MiB"


@contextmanager
def _progress_bar(name: str) -> Iterator[None]:
    """A progress bar on a terminal, unless a recipe shows one already."""
    if progress.current() is not None or not sys.stderr.isatty():
        yield
        return
    with progress.bars(1, [name]) as bars, bars.stage(name):
        yield


def _check_options(store: str, samples: int, dtype: str | None, *sizes: int | None) -> None:
    if store not in get_args(Store):
        raise ValueError(f"store is {store!r}: choose from {', '.join(get_args(Store))}")
    if store == "sampled" and not 1 <= samples < 2**31:
        raise ValueError(f"samples is {samples}: draw at least 1 id at each position, usually 32 to 128")
    if dtype is not None and dtype not in disk.CODES:
        raise ValueError(f"dtype is {dtype!r}: choose from {', '.join(disk.CODES)}, or None for the teacher's own")
    for name, size in zip(("shard_size", "batch_size"), sizes):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: give at least 1")


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _has_functions(teacher: Teacher) -> bool:
    """Whether a teacher is or contains a function, whose fingerprint does not determine its outputs."""
    try:
        return teacher.module is None
    except ValueError:
        return True


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _shard_size(shard_size: int | None, packed: Any, batch_size: int) -> int:
    """Samples in a shard, a multiple of the batch's."""
    wanted = shard_size if shard_size is not None else _SHARD_BYTES * len(packed["digest"]) // max(_bytes(packed), 1)
    return max(-(-wanted // batch_size), 1) * batch_size


def _open_index(folder: Path, split: str, fingerprint: dict[str, Any], entries: Any, shard_size: int) -> dict[str, Any]:
    """The index of the cache in ``folder``, new or of an earlier call.

    Raises:
        ValueError: If the folder holds something else.
    """
    if not (folder / disk.INDEX).is_file():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no {disk.INDEX}: choose an empty folder for the cache")
        described = {name: entry.as_json() for name, entry in entries.items()}
        index = {"complete": False, "split": split, "fingerprint": fingerprint, "entries": described, "shards": []}
        disk.write_index(folder, {**index, "shard_size": shard_size})
    index = disk.read_index(folder)
    if difference := disk.difference(index["fingerprint"], fingerprint):
        raise ValueError(f"{folder} holds a cache made with {difference}: choose another folder, or remove it")
    if disk.entries_of(index) != entries:
        raise ValueError(f"{folder} holds a cache of other shapes: choose another folder, or remove it")
    return index


def _is_whole(folder: Path, listed: Any) -> bool:
    try:
        disk.check_shard(folder, listed, thorough=True)
    except ValueError:
        return False
    return True


def _check_unchanged(folder: Path, source: _Source, parts: Sequence[disk.Part], entries: Any) -> None:
    """Compare a few samples of the shards of an earlier call with the data set.

    Raises:
        ValueError: If one has changed.
    """
    for part in parts[:: max(len(parts) // _TRIED, 1)]:
        stored = disk.Shard(folder, part, entries).tensors["digest"]
        for row in sorted({0, len(part) // 2, len(part) - 1}):
            index = EpochIndex(part.start + row, part.view)
            if not torch.equal(source.digests([index])[0], stored[row]):
                raise ValueError(
                    f"{folder} holds a cache made with another sample {int(index)}: choose another folder, or remove it"
                )


def _with_digests(batch: Any, indices: list[int], digested: Tensor | None) -> tuple[Tensor | None, Any]:
    return digested, batch


def _remove_temporaries(folder: Path) -> None:
    """Remove temporary files of interrupted calls."""
    for temporary in (*folder.glob(".shard-*.tmp"), *folder.glob(f".{disk.INDEX}.*.tmp")):
        temporary.unlink(missing_ok=True)
