"""Labelled images: MNIST-style IDX files, and the split, batches and order that all image sets here share."""

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SPLIT_SEED = 20_160_608
"""Seeds every train / validation / test split, whatever the seed of a run."""

Batch = tuple[Tensor, Tensor]

_CHUNK = 1 << 20
_DEFLATE_LIMIT = 1032  # no deflate stream expands further than this


def read_idx(path: str | os.PathLike[str], ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (told by its content), into a uint8 tensor.

    Layout: two zero bytes, the element type (8: unsigned byte), the number of axes, then each axis as a
    big-endian 32-bit count, then the elements, row by row. Nothing is allocated for the elements before the
    size of the file was seen to fit the header. http://yann.lecun.com/exdb/mnist/

    Args:
        path: The file.
        ndim: The number of axes it must have: 3 for images, 1 for labels.

    Raises:
        ValueError: No such file, or the file is foreign, truncated, corrupt or too long.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of an IDX file, plain or gzipped.")
    size = path.stat().st_size
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _read_idx(raw, path, ndim, size)
            with gzip.GzipFile(fileobj=raw) as unzipped:
                return _read_idx(unzipped, path, ndim, size * _DEFLATE_LIMIT, exact=False)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip stream ({error}); fetch the file again.") from error


def _read_idx(file: IO[bytes] | gzip.GzipFile, path: Path, ndim: int, room: int, exact: bool = True) -> Tensor:
    """The body of `read_idx`; ``room`` is the size of the plain file, unless exact an upper bound of it."""
    magic = file.read(4)
    if magic != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path}: starts with bytes {magic.hex(' ') or 'none'}, expected 00 00 08 {ndim:02x} "
            f"(IDX, unsigned bytes, {ndim} axes); this is another kind of file."
        )
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise ValueError(f"{path}: ends inside its header, expected {4 + 4 * ndim} bytes of it; fetch the file again.")
    shape = [int.from_bytes(header[i : i + 4], "big") for i in range(0, 4 * ndim, 4)]
    count, room = math.prod(shape), room - 4 - 4 * ndim
    if count == 0:
        raise ValueError(f"{path}: its header says shape {shape}, expected every axis to be at least 1 long.")
    if count > room or (exact and count != room):
        bound = f"has {room}" if exact else f"cannot hold more than {room}"
        raise ValueError(f"{path}: shape {shape} needs {count} bytes of elements, the file {bound}; fetch it again.")
    elements = bytearray()
    while len(elements) < count and (chunk := file.read(min(_CHUNK, count - len(elements)))):
        elements += chunk
    if len(elements) < count or file.read(1):  # the read past the end makes gzip verify its checksum
        found = f"only {len(elements)}" if len(elements) < count else "more"
        raise ValueError(f"{path}: shape {shape} needs {count} bytes of elements, found {found}; fetch it again.")
    return torch.frombuffer(elements, dtype=torch.uint8).reshape(shape)


def stratified_split(labels: Sequence[int] | np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Split indices at random into the rest and parts of given sizes, each class shared out in proportion.

    In each part a class has its proportional number of members rounded down or up, by largest remainder, ties
    going to the lower class. Depends on nothing but the arguments: ``numpy.random.RandomState`` is frozen by
    numpy's policy.

    Args:
        labels: The class of each sample, [N].
        sizes: Size of each part.
        seed: Seed of the draw.

    Returns:
        1 + len(sizes) sorted, disjoint index arrays, together 0 .. N-1; the rest comes first.

    Raises:
        ValueError: A size below 1, or no sample left for the rest.
    """
    labels = np.asarray(labels)
    if any(size < 1 for size in sizes) or sum(sizes) >= len(labels):
        raise ValueError(
            f"cannot split {len(labels)} samples into parts of {list(sizes)} and a rest: give sizes of "
            f"at least 1 with a sum below {len(labels)}."
        )
    random = np.random.RandomState(seed)
    pools = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    parts = []
    for size in sizes:
        counts = np.array([len(pool) for pool in pools])
        take, remainder = np.divmod(counts * size, counts.sum())
        take[np.argsort(-remainder, kind="stable")[: size - take.sum()]] += 1
        parts.append(np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, take)])))
        pools = [pool[n:] for pool, n in zip(pools, take)]
    return [np.sort(np.concatenate(pools)), *parts]


@final
class LabelledImages(Dataset[Batch]):
    """Images held in memory as they were stored, and standardised a batch at a time: (x - mean) / std.

    Args:
        images: Pixels of any dtype, [N, ...].
        labels: Classes, [N].
        mean: Mean to subtract.
        std: Standard deviation to divide by.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        self.images, self.labels = images, labels.long()
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return (self.images[index].float() - self.mean) / self.std, self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once: x float32 [B, ...], y int64 [B]."""
        chosen = torch.as_tensor(indices)
        return (self.images[chosen].float() - self.mean) / self.std, self.labels[chosen]


def _as_is(batch: Any) -> Batch:
    return batch


def loader(data: LabelledImages, batch_size: int, num_workers: int, shuffle: bool) -> DataLoader[Batch]:
    """Batches of (x, y), in stored order or, shuffled, in an order that torch's seed at this call decides.

    A plain DataLoader with a generator of its own: iterating it leaves torch's global random state as it was.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() if shuffle else SPLIT_SEED)
    return DataLoader(
        data,
        batch_size,
        shuffle,
        num_workers=num_workers,
        collate_fn=_as_is,
        generator=generator,
        persistent_workers=num_workers > 0,
    )


def check_loader_arguments(batch_size: int, num_workers: int) -> None:
    """Raise ValueError unless batch_size >= 1 and num_workers >= 0."""
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size}, num_workers={num_workers}: give at least 1 and 0.")


def find_idx(root: Path, part: str, content: str, ndim: int) -> Path:
    """The file of a part ("train", "t10k") and content ("images", "labels") under one of its canonical names.

    Raises:
        ValueError: The folder or the file is not there.
    """
    tried = [
        f"{part}-{content}{mark}idx{ndim}-ubyte{suffix}"  # the original archive has -, some unpackers write .
        for suffix in ("", ".gz")
        for mark in "-."
    ]
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; set root to the folder that holds {tried[0]}[.gz] and its siblings.")
    for name in tried:
        if (root / name).is_file():
            return root / name
    raise ValueError(f"{root}: found none of {', '.join(tried)}; put the file there or set root to its folder.")


@final
class IDXImages(pl.LightningDataModule):
    """MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST ...) from the IDX files in a folder.

    Batches: x float32 [B, 1, height, width], y int64 [B]. The validation part is cut from the training file,
    stratified and the same in every run; the ``t10k`` files are the test part. Training order depends on
    (seed, epoch) alone.

    Args:
        root: Folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k files, each plain
            or .gz. ``~`` and environment variables (``$DATA/mnist``) are expanded.
        batch_size: Samples in a batch.
        validation: Samples held out from the training file.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        normalize: Standardise by the mean and deviation of all pixels of the training part; otherwise scale
            to [0, 1].
        classes: Number of classes; labels must lie below.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or wrong file, or a label that is too
            large.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int = 128,
        validation: int = 5000,
        num_workers: int = 0,
        normalize: bool = True,
        classes: int = 10,
    ) -> None:
        super().__init__()
        check_loader_arguments(batch_size, num_workers)
        if validation < 1 or classes < 1:
            raise ValueError(f"validation={validation}, classes={classes}: both must be at least 1.")
        self.root = Path(os.path.expandvars(root)).expanduser()
        self.batch_size = batch_size
        self.validation = validation
        self.num_workers = num_workers
        self.normalize = normalize
        self.classes = classes
        self.parts: dict[str, LabelledImages] = {}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (1, height, width); reads the files if that was not done yet."""
        self.setup()
        return tuple(self.parts["train"].images.shape[1:])

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        at = find_idx(self.root, part, "images", 3), find_idx(self.root, part, "labels", 1)
        images, labels = read_idx(at[0], 3), read_idx(at[1], 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{at[0]} has {len(images)} images, {at[1]} has {len(labels)} labels: not of one data set."
            )
        if labels.max() >= self.classes:
            raise ValueError(f"{at[1]} has label {int(labels.max())}, but classes={self.classes}: raise classes.")
        return images.unsqueeze(1), labels

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once."""
        if self.parts:
            return
        images, labels = self._read("train")
        test_images, test_labels = self._read("t10k")
        if test_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{self.root}: training images are {tuple(images.shape[2:])}, test images "
                f"{tuple(test_images.shape[2:])} pixels; the files are not of one data set."
            )
        train, val = map(torch.from_numpy, stratified_split(labels.numpy(), [self.validation], SPLIT_SEED))
        scale = (0.0, 255.0)
        if self.normalize:
            counts = torch.bincount(images[train].flatten(), minlength=256).double()
            levels = torch.arange(256, dtype=torch.float64)
            mean = float(counts @ levels / counts.sum())
            scale = mean, max(float((counts @ (levels - mean) ** 2 / counts.sum()).sqrt()), 1.0)
        self.parts = {
            "train": LabelledImages(images[train], labels[train], *scale),
            "val": LabelledImages(images[val], labels[val], *scale),
            "test": LabelledImages(test_images, test_labels, *scale),
        }

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Batch]:
        self.setup()
        return loader(self.parts[part], self.batch_size, self.num_workers, shuffle)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training part, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation part, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test part, in order."""
        return self._loader("test")
