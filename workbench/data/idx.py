"""MNIST-style IDX files."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, final

import torch
from torch import Tensor

from workbench.data.augment import Augment
from workbench.data.images import ImageModule
from workbench.paths import expand_variables

_CHUNK = 1 << 20
_DEFLATE_LIMIT = 1032  # no deflate stream expands further than this


def read_idx(path: str | os.PathLike[str], ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (detected by content), into a uint8 tensor.

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
        raise ValueError(f"{path}: its header has shape {shape}, expected every axis to be at least 1 long.")
    if count > room or (exact and count != room):
        bound = f"has {room}" if exact else f"cannot hold more than {room}"
        raise ValueError(f"{path}: shape {shape} needs {count} bytes of elements, the file {bound}; fetch it again.")
    elements = bytearray()
    while len(elements) < count and (chunk := file.read(min(_CHUNK, count - len(elements)))):
        elements += chunk
    if len(elements) < count or file.read(1):  # the read past the end makes gzip verify its checksum
        held = f"only {len(elements)}" if len(elements) < count else "more"
        raise ValueError(f"{path}: shape {shape} needs {count} bytes of elements, found {held}; fetch it again.")
    return torch.frombuffer(elements, dtype=torch.uint8).reshape(shape)


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
class IDXImages(ImageModule):
    """MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST ...) from the IDX files in a folder.

    Batches: x float32 [B, 1, height, width], y int64 [B]. The validation part is cut from the training file,
    stratified and the same in every run; the ``t10k`` files are the test part. Training order depends on
    (seed, epoch) alone, and so does augmentation. From the hub the same sets come as `ParquetImages` with channels 1.

    Args:
        root: Folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k files, each plain
            or .gz. ``~`` and environment variables (``$DATA/mnist``) are expanded.
        batch_size: Samples in a batch.
        validation: Samples held out from the training file.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        normalize: Standardise by the mean and deviation of all pixels of the training part; otherwise scale
            to [0, 1].
        classes: Number of classes; labels must lie below.
        augment: Whether and how training images are varied; true means a crop after padding by 2, unmirrored.
        views: Number of different views of a training image; 0 for a new one every epoch. See `ImageModule`.

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
        augment: bool | Augment = False,
        views: int = 0,
    ) -> None:
        how = Augment(padding=2, flip=False) if augment is True else augment or None
        super().__init__(batch_size, validation, num_workers, normalize, classes, how, views)
        self.root = Path(expand_variables(root))

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The four files."""
        train, test = self._read("train"), self._read("t10k")
        if test[0].shape[1:] != train[0].shape[1:]:
            raise ValueError(
                f"{self.root}: training images are {tuple(train[0].shape[2:])}, test images "
                f"{tuple(test[0].shape[2:])} pixels; the files are not of one data set."
            )
        return train, test

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
