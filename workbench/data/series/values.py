"""Numbers of time series: read one by one, missing ones NaN, standardised channel by channel."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

MISSING = ("", "?", "nan", "na")
"""Spellings of a missing number in a text file, in lower case."""

_LARGEST = float(np.finfo(np.float32).max)


def parse_number(value: Any) -> float:
    """A number, or a text of one; NaN for a missing one.

    Raises:
        ValueError: If it is neither, or no finite number of single precision, as networks compute.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return float("nan")
    try:
        parsed = float("_" if isinstance(value, bool) or "_" in str(value) else value)
    except (TypeError, ValueError):
        parsed = float("inf")
    if abs(parsed) > _LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is no finite number")
    return parsed


class Scale(NamedTuple):
    """Mean and standard deviation of every channel, float64 [F] each."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Standardised, (x - mean) / std, float32 [..., F]; a missing value stays NaN."""
        return ((values - self.mean) / self.std).astype(np.float32)


def fit_scale(series: Iterable[np.ndarray], where: object) -> Scale:
    """The scale of all steps of several series together; missing values do not count.

    A channel that never varies has the deviation 1.

    Args:
        series: [L, F] each.
        where: Named in errors.

    Raises:
        ValueError: If a channel has no value at all.
    """
    values = np.concatenate([np.asarray(each, dtype=np.float64) for each in series])
    valid = ~np.isnan(values)
    count = valid.sum(0)
    if (empty := np.flatnonzero(count == 0)).size:
        raise ValueError(f"{where}: channel {empty[0]} has no value in the training part: leave it out.")
    mean = np.where(valid, values, 0.0).sum(0) / count
    std = np.sqrt(np.square(np.where(valid, values - mean, 0.0)).sum(0) / count)
    # A deviation within rounding error of a constant counts as 0.
    return Scale(mean, np.where(std > 1e-12 * np.abs(mean), std, 1.0))


def identity_scale(features: int) -> Scale:
    """The scale that leaves values as they are."""
    return Scale(np.zeros(features), np.ones(features))
