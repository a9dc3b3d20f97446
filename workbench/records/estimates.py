"""Means over seeds, as records hold them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.fields import mapping, number, objects, whole


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its interval, whose ends are None where n does not allow one."""

    n: int | None
    mean: float
    low: float | None
    high: float | None
    confidence: float | None


def estimate(path: Path, record: dict[str, Any], n: int | None = None) -> Estimate | None:
    """A mean with its interval; None where there is no mean.

    Raises:
        ValueError: If it is malformed.
    """
    mean, interval = number(record, "mean"), mapping(path, record, "interval")
    if mean is None:
        return None
    low, high, confidence = (number(interval, key) for key in ("low", "high", "confidence"))
    return Estimate(whole(record, "n") if n is None else n, mean, low, high, confidence)


def estimates(path: Path, record: dict[str, Any], key: str, n: int | None = None) -> dict[str, Estimate]:
    """An object of means; what has none is left out.

    Raises:
        ValueError: If it is malformed.
    """
    found = {printable(name): estimate(path, entry, n) for name, entry in objects(path, record, key).items()}
    return {name: told for name, told in found.items() if told is not None}
