"""Forecasting: the next steps of one long series."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset, default_collate

from workbench.data.prepared import Prepared
from workbench.data.series.batches import SeriesModule, Windows
from workbench.data.series.values import Scale, fit_scale, identity_scale, parse_number
from workbench.data.splits import WHOLE
from workbench.data.text.reading import read_rows
from workbench.tasks import Regression

_PARTS = ("train", "val", "test")


@final
class SeriesForecast(SeriesModule):
    """A table of numbers over time, in windows: ``length`` steps are given, the next ``horizon`` are the target.

    Batches: x float32 [B, length, F] and y float32 [B, horizon, targets], both standardised by mean and deviation of
    the training part; a missing value is 0 in x and NaN in y, which `workbench.tasks.Regression` does not count.

    The rows are split in the order of time. A target step of a later part is in no window of an earlier part; the
    input before the first step of validation and test is the end of the previous part, as in the published figures.
    The standard split of ETTh1 and ETTh2, 12, 4 and 4 months of 30 days, is ``split: [8640, 2880, 2880]`` (Zhou et al.
    2021, arXiv:2012.07436, section 5.1); the remaining rows are left out.

    Args:
        path: A table with a row for each step, the rows in the order of time: CSV with a header or anything else
            `workbench.data.text.reading.read_rows` reads, in which ``~`` and environment variables
            (``$DATA/ett/ETTh1.csv``) are replaced; or the name of a data set of the hub. A source that comes in the
            parts train, val and test keeps them, each by itself, and ``split`` is not looked at.
        columns: Names of the columns that are seen, F of them, at even steps.
        targets: Names of those that are foretold; all of them if None.
        length: Steps seen.
        horizon: Steps foretold.
        stride: Steps from one window to the next.
        split: Training, validation and test part: fractions, with a sum of at most 1, or numbers of rows.
        batch_size: Windows in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        normalize: Whether to standardise.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken source or column, or a part that is
            shorter than a window.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: list[str],
        targets: list[str] | None = None,
        length: int = 96,
        horizon: int = 24,
        stride: int = 1,
        split: tuple[float, float, float] = (0.7, 0.1, 0.2),
        batch_size: int = 32,
        num_workers: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if not columns or isinstance(columns, str) or len(set(columns)) < len(columns):
            raise ValueError(f"columns={columns!r}: give a list of names, each once.")
        targets = list(columns) if targets is None else list(targets)
        if unknown := [name for name in targets if name not in columns] or ([] if targets else ["none"]):
            raise ValueError(f"targets={targets}: {unknown[0]!r} is none of the columns {', '.join(columns)}.")
        if min(length, horizon, stride) < 1:
            raise ValueError(f"length={length}, horizon={horizon}, stride={stride}: each must be at least 1.")
        _check_split(split)
        self.path, self.columns, self.targets = path, list(columns), targets
        self.length, self.horizon, self.stride = length, horizon, stride
        self.split, self.normalize = tuple(split), normalize

    @property
    def task(self) -> Regression:
        """What a recipe trains for unless it names a task: mean squared error of [B, horizon, targets]."""
        return Regression(shape=[self.horizon, len(self.targets)])

    def read(self) -> Prepared[Scale]:
        """Read, split in the order of time, standardise by the training part and cut into windows."""
        tables = {
            name: _table(rows, self.columns, f"{self.path}, {name!r}")
            for name, rows in read_rows(self.path, self.columns).items()
        }
        if set(_PARTS) <= set(tables):
            training, parts = tables["train"], {name: tables[name] for name in _PARTS}
        elif len(tables) == 1 and {*tables} <= {"train", WHOLE}:
            (whole,) = tables.values()
            ends = self._ends(len(whole))
            training = whole[: ends[0]]
            begins = [0, *(max(0, end - self.length) for end in ends[:-1])]
            parts = {name: whole[begin:end] for name, begin, end in zip(_PARTS, begins, ends)}
        else:
            raise ValueError(
                f"{self.path}: has the parts {', '.join(tables)}, where one table is needed, or train, val and test."
            )
        scale = fit_scale([training], self.path) if self.normalize else identity_scale(len(self.columns))
        chosen = [self.columns.index(name) for name in self.targets]
        data: dict[str, Dataset[Any]] = {}
        for name, values in parts.items():
            try:
                data[name] = Windows(scale(values), chosen, self.length, self.horizon, self.stride)
            except ValueError as error:
                raise ValueError(f"{self.path}: the part {name} {error}") from error
        return Prepared(data, default_collate, scale)

    def _ends(self, rows: int) -> list[int]:
        """The row after each part."""
        fractions = max(self.split) < 1
        sums = np.cumsum(self.split)
        ends = [round(float(end) * rows) if fractions else int(end) for end in sums]
        if ends[-1] > rows:
            raise ValueError(
                f"{self.path}: has {rows} rows, and split={list(self.split)} takes {ends[-1]}: take fewer."
            )
        return ends


def _check_split(split: Sequence[float]) -> None:
    fractions = all(0 < part < 1 for part in split) and sum(split) <= 1 + 1e-9
    counts = all(part >= 1 and part == int(part) for part in split)
    if len(split) != 3 or not (fractions or counts):
        raise ValueError(
            f"split={list(split)}: give three fractions with a sum of at most 1, or three numbers of rows."
        )


def _table(rows: Iterable[tuple[Any, ...]], columns: Sequence[str], where: str) -> np.ndarray:
    """Float64 [T, F], missing values NaN."""
    values = []
    for row_number, row in enumerate(rows, 1):
        try:
            values.append([parse_number(value) for value in row])
        except ValueError as error:
            raise ValueError(f"{where}, row {row_number}: {error}: choose from {', '.join(columns)}.") from error
    return np.array(values)
