"""Images in parquet files, or in a data set of the Hugging Face hub, as JPEG or PNG beside their labels."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from workbench.data.augment import Augment
from workbench.data.hub import is_hub_name, load_from_hub
from workbench.data.images import ImageModule
from workbench.paths import expand_variables

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet")
_ROWS = 1024


def decode_image(content: bytes, mode: Literal["L", "RGB"], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The pixels of a JPEG, PNG or any other file that Pillow reads, uint8 [height, width] or [height, width, 3].

    Args:
        content: The bytes of the file.
        mode: "L" for grey levels, "RGB" for colours; converted to where it is stored otherwise.
        shape: Height and width that it must have, seen before the pixels are decoded; None for any.

    Raises:
        ValueError: If it cannot be decoded, or has another shape.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            size = (image.height, image.width)
            if shape in (None, size):
                return np.array(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # its many decoders raise anything on broken bytes
        raise ValueError(f"cannot be decoded ({error}); mend or drop that row") from error
    assert shape is not None
    raise ValueError(
        f"is {size[1]}x{size[0]} pixels, the first one {shape[1]}x{shape[0]}: bring all images to one size"
    )


def decode_rows(
    rows: Iterable[tuple[Any, Any]], where: str, channels: int, classes: int, base: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Decode (image, label) rows into uint8 [N, C, H, W] and int64 [N].

    An image is bytes, or a mapping with ``bytes`` or, without them, the ``path`` of a file.

    Args:
        rows: The rows in order.
        where: Named in errors, with the number of the row.
        channels: 1 for grey levels, 3 for colours.
        classes: Labels must lie in 0 .. classes - 1.
        base: The folder that paths are relative to.

    Raises:
        ValueError: No rows, an image that is missing or cannot be decoded, images of several sizes, a label that is
            none; with the number of the row.
    """
    pixels, labels = bytearray(), []
    shape: tuple[int, ...] | None = None
    for number, (image, label) in enumerate(rows):
        try:
            array = decode_image(_content(image, base), "RGB" if channels == 3 else "L", shape)
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: the image {error}.") from error
        shape = array.shape[:2]
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
            raise ValueError(f"{where}, row {number}: label {label!r} is not in 0 .. {classes - 1}: set classes.")
        pixels += array.tobytes()
        labels.append(label)
    if shape is None:
        raise ValueError(f"{where}: has no rows.")
    images = torch.frombuffer(pixels, dtype=torch.uint8).reshape(len(labels), *shape, channels)
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _content(image: Any, base: Path | None) -> bytes:
    """The bytes of the image file in a row."""
    content = image.get("bytes") if isinstance(image, dict) else image
    path = image.get("path") if isinstance(image, dict) else None
    if content is None and path:
        try:
            return (Path(path) if base is None else base / path).read_bytes()
        except OSError as error:
            raise ValueError(f"file {path} cannot be read ({error.strerror})") from error
    if not isinstance(content, bytes):
        raise ValueError(f"is {type(content).__name__}, expected the bytes of a JPEG or PNG file")
    return content


def find_parquet(root: Path, part: str) -> list[Path]:
    """The files of a part: ``part.parquet``, or the shards ``part-00000-of-00002.parquet`` ..., also below ``data``.

    Raises:
        ValueError: If there are none, or a shard is missing.
    """
    for folder in (root, root / "data"):
        if (whole := folder / f"{part}.parquet").is_file():
            return [whole]
        if shards := sorted(folder.glob(f"{part}-*-of-*.parquet")):
            numbers = [match.groups() for each in shards if (match := _SHARD.search(each.name))]
            if [int(number) for number, _ in numbers] != list(range(int(numbers[0][1]) if numbers else 0)):
                raise ValueError(f"{folder}: has only {', '.join(each.name for each in shards)}; fetch the others.")
            return shards
    raise ValueError(
        f"{root}: found neither {part}.parquet nor {part}-00000-of-....parquet; put it there or set root to its folder."
    )


def read_rows(path: Path, image: str, label: str) -> Iterator[tuple[Any, Any]]:
    """(image, label) of every row of a parquet file, read a thousand at a time.

    Raises:
        ValueError: If it is no parquet file, is broken, or lacks one of the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in (image, label) if name not in names]:
                raise ValueError(
                    f"{path}: has no column {missing[0]!r}, only {', '.join(map(repr, names))}: set image and label."
                )
            for batch in file.iter_batches(_ROWS, columns=[image, label]):
                yield from zip(batch.column(image).to_pylist(), batch.column(label).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}); fetch the file again.") from error


@final
class ParquetImages(ImageModule):
    """Images with labels from parquet files in a folder, or from a data set of the Hugging Face hub.

    Every row has an image, the bytes of a JPEG or PNG file by themselves or as ``{bytes, path}`` (as `datasets` writes
    them), and an integer label. All are decoded once, on `setup`, and held as bytes: 3 kB for a 32x32 colour image.

    Batches: x float32 [B, channels, height, width], y int64 [B]. The validation part is cut from the training rows,
    stratified and the same in every run; the test rows are the test part. Training order and augmentation depend on
    (seed, epoch) alone.

    Args:
        root: Folder with train.parquet and test.parquet, each possibly in shards, as the hub has them. ``~`` and
            environment variables (``$DATA/cifar10``) are expanded. Where there is no such folder, the name of a data
            set of the hub, with splits train and test: ``uoft-cs/cifar10`` with image ``img``, or MNIST as
            ``ylecun/mnist`` with channels 1; a configuration, if there are several, after a colon.
        image: Name of the column of images.
        label: Name of the column of labels.
        batch_size: Samples in a batch.
        validation: Samples held out from the training rows.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        normalize: Standardise each channel by mean and deviation of its pixels in the training part; otherwise scale
            to [0, 1].
        classes: Number of classes; labels must lie below.
        channels: 3 for colours, 1 for grey levels; images are converted.
        augment: Whether and how training images are varied; true means a crop after padding by 4, mirrored half the
            time.
        views: Number of different views of a training image; 0 for a new one every epoch. See `ImageModule`.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken file or column, an image that cannot be
            decoded or has another size than the first, or a label out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image: str = "image",
        label: str = "label",
        batch_size: int = 128,
        validation: int = 2000,
        num_workers: int = 0,
        normalize: bool = True,
        classes: int = 10,
        channels: int = 3,
        augment: bool | Augment = False,
        views: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            validation,
            num_workers,
            normalize,
            classes,
            Augment() if augment is True else augment or None,
            views,
        )
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: give 3 for colours or 1 for grey levels.")
        self.root = expand_variables(root)
        self.image, self.label, self.channels = image, label, channels

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Decode the rows of both splits."""
        folder = Path(self.root)
        if not folder.is_dir() and (folder.exists() or not is_hub_name(self.root)):
            raise ValueError(
                f"{self.root}: no such folder; set root to the folder that holds train.parquet and test.parquet, or to "
                "the name of a data set of the hub."
            )
        train, test = self._folder(folder) if folder.is_dir() else self._hub(self.root)
        if train[0].shape[1:] != test[0].shape[1:]:
            raise ValueError(
                f"{self.root}: training images are {tuple(train[0].shape[2:])}, test images "
                f"{tuple(test[0].shape[2:])} pixels; they are not of one data set."
            )
        return train, test

    def _folder(self, folder: Path) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for part in ("train", "test"):
            files = find_parquet(folder, part)
            decoded = [
                decode_rows(
                    read_rows(path, self.image, self.label), str(path), self.channels, self.classes, path.parent
                )
                for path in files
            ]
            if len({tuple(images.shape[1:]) for images, _ in decoded}) > 1:
                raise ValueError(f"{folder}: the {part} shards have images of several sizes: bring all to one size.")
            images, labels = zip(*decoded)
            parts.append((torch.cat(images), torch.cat(labels)))
        return parts

    def _hub(self, name: str) -> list[tuple[Tensor, Tensor]]:
        import datasets

        splits = load_from_hub(name, "; set root to the folder that holds train.parquet and test.parquet")
        parts = []
        for part in ("train", "test"):
            if part not in splits:
                raise ValueError(f"{name}: has no split {part!r}, only {', '.join(map(str, splits))}.")
            split: Any = splits[part]
            if missing := [column for column in (self.image, self.label) if column not in split.column_names]:
                raise ValueError(
                    f"{name}: has no column {missing[0]!r}, only {', '.join(map(repr, split.column_names))}: "
                    "set image and label."
                )
            split = split.select_columns([self.image, self.label])
            split = split.cast_column(self.image, datasets.Image(decode=False))
            rows = ((row[self.image], row[self.label]) for row in split)
            parts.append(decode_rows(rows, f"{name}, {part}", self.channels, self.classes))
        return parts
