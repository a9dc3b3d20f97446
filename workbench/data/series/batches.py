"""Time series in memory: labelled series, padding, windows, and the base of their data modules."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from workbench.data.prepared import InMemoryDataModule
from workbench.data.series.values import Scale

Item = dict[str, Tensor]


@final
class LabelledSeries(Dataset[Item]):
    """Series of unequal length, standardised, and their classes.

    An item is ``{"series": float32 [L, F], "labels": class}``, missing values 0, which is the mean.

    Args:
        series: [L, F] each, missing values NaN.
        labels: A class each.
        scale: What they are standardised by.
    """

    views = 1

    def __init__(self, series: Sequence[np.ndarray], labels: Sequence[int], scale: Scale) -> None:
        self.ends = np.cumsum([len(each) for each in series])
        self.values = torch.from_numpy(np.nan_to_num(scale(np.concatenate(series)), nan=0.0))
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"there is no series {index} among {len(self.ends)}")
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        return {"series": self.values[start:end], "labels": self.labels[index]}


@final
class SeriesPadding:
    """Makes a batch of items of unequal length, by the names that a model's forward takes.

    Args:
        inputs: Name of the series.
        mask: Whether ``attention_mask`` marks the padding, instead of ``lengths``.
    """

    def __init__(self, inputs: str, mask: bool) -> None:
        self.inputs, self.mask = inputs, mask

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Series [B, L, F] filled up with zeros to the longest, lengths [B] or mask [B, L], and labels [B], int64."""
        series = [item["series"] for item in items]
        lengths = torch.tensor([len(each) for each in series])
        steps = torch.arange(int(lengths.max()))
        return {
            self.inputs: pad_sequence(series, batch_first=True),
            **({"attention_mask": (steps < lengths[:, None]).long()} if self.mask else {"lengths": lengths}),
            "labels": torch.stack([item["labels"] for item in items]),
        }


@final
class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of one series: ``(past, float32 [length, F], future, float32 [horizon, targets])``.

    Window i begins at step ``i * stride``. A missing value is 0 in the past, NaN in the future.

    Args:
        values: The series, standardised, float32 [T, F].
        targets: The channels to forecast.
        length: Steps of the past.
        horizon: Steps of the future.
        stride: Steps from one window to the next.

    Raises:
        ValueError: If the series is shorter than a window.
    """

    views = 1

    def __init__(self, values: np.ndarray, targets: Sequence[int], length: int, horizon: int, stride: int) -> None:
        if len(values) < length + horizon:
            raise ValueError(
                f"has {len(values)} steps, fewer than length + horizon = {length + horizon}: set smaller ones, or give "
                "it more steps."
            )
        self.past = torch.from_numpy(np.nan_to_num(values, nan=0.0))
        self.future = torch.from_numpy(np.ascontiguousarray(values[:, list(targets)]))
        self.length, self.horizon, self.stride = length, horizon, stride
        self.count = (len(values) - length - horizon) // stride + 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"there is no window {index} among {self.count}")
        now = index * self.stride + self.length
        return self.past[now - self.length : now], self.future[now : now + self.horizon]


class SeriesModule(InMemoryDataModule[Scale]):
    """A data module over series in memory; subclasses read them. Arguments as of its base."""

    @property
    def scale(self) -> Scale:
        """Mean and deviation of every channel, by which to get back to its unit."""
        return self._ready.info

    @property
    def channels(self) -> int:
        """Number of input channels, F."""
        return len(self.scale.mean)
