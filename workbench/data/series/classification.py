"""Series of one class each."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np

from workbench.data.prepared import Prepared
from workbench.data.series.batches import LabelledSeries, SeriesModule, SeriesPadding
from workbench.data.series.ts import Row, find_ts, read_ts, test_file_of
from workbench.data.series.values import Scale, fit_scale, identity_scale, parse_number
from workbench.data.splits import Rows, check_fractions, split_classes
from workbench.data.text.reading import read_rows
from workbench.paths import resolve_path


@final
class SeriesClassification(SeriesModule):
    """Time series of one class each and any length, from ``.ts`` files, a table or the hub.

    The ``.ts`` files of the UEA and UCR archives are read by `workbench.data.series.ts.read_ts`. Any other file, folder
    or name is read by `workbench.data.text.reading.read_rows`: a column of series, each a list of numbers or a list of
    steps with a number for each channel, and a column of classes. Parts that a source lacks are cut from its training
    part, stratified and the same in every run.

    Batches: ``x`` float32 [B, L, F], filled up with zeros on the right to the longest of the batch; ``lengths`` int64
    [B], the steps before that, or ``attention_mask`` int64 [B, L], 1 at them; ``labels`` int64 [B]. A model takes all
    but the labels by keyword, as `workbench.models.Recurrent` does. Missing values are the mean of their channel, 0.
    Classes are numbered in the order of the ``.ts`` header, else of their names, or of their numbers.

    Args:
        path: A folder with NAME_TRAIN.ts and NAME_TEST.ts, or the training file, beside which the other is looked for;
            or a file or folder of tables, or the name of a data set of the hub. ``~`` and environment variables
            (``$DATA/japanese_vowels``) are replaced.
        test: The ``.ts`` file of the test part, if it is elsewhere.
        series: Name of the column of series, for tables and the hub.
        label: Name of the column of classes, for tables and the hub.
        channels_first: Whether such a series is a list of channels, each a list of numbers, rather than of steps.
        inputs: Name by which the model takes the series, e.g. ``input_ids`` for `workbench.models.Transformer`.
        mask: Whether the model takes ``attention_mask`` in the place of ``lengths``; losses on features, too, then know
            what is padding.
        batch_size: Series in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        validation: Fraction of the training part that becomes the validation part, where there is none.
        testing: The same for the test part.
        normalize: Standardise each channel by mean and deviation of its values in the training part.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken source, parts with other channels, a class
            that training never saw, or fewer than two classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        test: str | os.PathLike[str] | None = None,
        series: str = "series",
        label: str = "label",
        channels_first: bool = False,
        inputs: str = "x",
        mask: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: float = 0.2,
        testing: float = 0.2,
        normalize: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_fractions(validation=validation, testing=testing)
        self.path, self.test = path, test
        self.series, self.label, self.channels_first = series, label, channels_first
        if not inputs.isidentifier() or inputs in ("labels", "lengths", "attention_mask"):
            raise ValueError(f"inputs={inputs!r}: give the name of an argument of the model, such as x.")
        self.inputs, self.mask = inputs, mask
        self.validation, self.testing, self.normalize = validation, testing, normalize

    @property
    def names(self) -> list[str]:
        """The classes' names by number; read now if necessary."""
        return list(self._ready.names)

    @property
    def classes(self) -> int:
        """Number of classes; read now if necessary."""
        return len(self.names)

    def read(self) -> Prepared[Scale]:
        """Read, split and standardise by the training part."""
        rows, header_names = self._read()
        _check_channels(rows, self.path)
        parts, names = split_classes(rows, self.validation, self.testing, self.path, header_names)
        training = [values for values, _ in parts["train"]]
        scale = fit_scale(training, self.path) if self.normalize else identity_scale(training[0].shape[1])
        data = {
            part: LabelledSeries([values for values, _ in rows], [number for _, number in rows], scale)
            for part, rows in parts.items()
        }
        return Prepared(data, SeriesPadding(self.inputs, self.mask), scale, names)

    def _read(self) -> tuple[dict[str, Rows], list[str]]:
        """Rows by split, and the classes where a header names them."""
        path = Path(resolve_path(self.path))
        if path.is_dir() and self.test is None:
            pair = find_ts(path)
        elif path.suffix == ".ts" or self.test is not None:
            pair = (path, test_file_of(path) if self.test is None else Path(resolve_path(self.test)))
        else:
            pair = None
        if pair is None:
            rows = read_rows(self.path, (self.series, self.label))
            return {split: list(self._rows(each, f"{self.path}, {split!r}")) for split, each in rows.items()}, []
        train = read_ts(pair[0])
        splits: dict[str, Rows] = {"train": [*train.rows]}
        if pair[1] is not None:
            splits["test"] = [*read_ts(pair[1]).rows]
        return splits, list(train.classes)

    def _rows(self, rows: Iterable[tuple[Any, ...]], where: str) -> Iterable[Row]:
        """Series as arrays and classes as names."""
        for row_number, (series, label) in enumerate(rows, 1):
            if not isinstance(label, str | int) or isinstance(label, bool):
                raise ValueError(f"{where}, row {row_number}: class {label!r} is no name or number: set label.")
            try:
                yield _series(series, self.channels_first), str(label)
            except ValueError as error:
                raise ValueError(f"{where}, row {row_number}: {error}: set series.") from error


def _series(series: Any, channels_first: bool) -> np.ndarray:
    """Float64 [L, F] out of a list of numbers, or a list of lists."""
    if not isinstance(series, list | tuple | np.ndarray) or not len(series):
        raise ValueError(f"{repr(series)[:40]} is no list of numbers")
    rows = [list(step) if isinstance(step, list | tuple | np.ndarray) else [step] for step in series]
    if len({len(row) for row in rows}) > 1 or not rows[0]:
        raise ValueError(f"a series has lists of {sorted({len(row) for row in rows})} numbers: give each as many")
    values = np.array([[parse_number(value) for value in row] for row in rows])
    return values.T if channels_first and isinstance(series[0], list | tuple | np.ndarray) else values


def _check_channels(splits: Mapping[str, Rows], where: object) -> None:
    wanted: int | None = None
    for split, rows in splits.items():
        for row_number, (values, _) in enumerate(rows, 1):
            wanted = wanted or values.shape[1]
            if values.shape[1] != wanted:
                raise ValueError(
                    f"{where}, {split!r}, series {row_number}: has {values.shape[1]} channels, the first one {wanted}: "
                    "give all the same channels."
                )
