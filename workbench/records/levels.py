"""The levels of a hunt, of its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.fields import column, listed, mapping, number, numbers, objects, text, truth, whole


@dataclass(frozen=True)
class Barrier:
    """The error barrier on the line between two trainings.

    Attributes:
        height: How far the line rises above the mean of its ends; of errors a share, of losses in their unit.
        excess: How far it rises above the straight line between its ends.
        stable: Whether it is low enough to count as none; None of losses.
    """

    height: float
    excess: float | None
    stable: bool | None


@dataclass(frozen=True)
class Level:
    """One level of a hunt; densities are kept / prunable weights.

    Attributes:
        controls: Arm -> its metrics.
        diagnosis: Of the ticket, ``units``, ``dead`` and ``gradient_flow``, where known.
        orders: The barrier between the ticket and itself trained on another order of the data.
        last: The barrier between the ticket and the last level's.
        distances: Of the mask that would be drawn next, after each epoch, to that of the epoch before.
    """

    level: int | None
    density: float | None
    metrics: dict[str, float]
    mask_hash: str | None
    seconds: float | None
    size: dict[str, float]
    history: list[dict[str, float]]
    controls: dict[str, dict[str, float]]
    diagnosis: dict[str, float]
    orders: Barrier | None
    last: Barrier | None
    distances: list[float | None]


def levels(path: Path, record: dict[str, Any]) -> list[Level]:
    """The entry ``levels`` of the record at ``path``.

    Raises:
        ValueError: If it is malformed.
    """
    return [_level(path, entry) for entry in listed(path, record, "levels")]


def history(path: Path, record: dict[str, Any]) -> list[dict[str, float]]:
    """The entry ``history``: a row an epoch.

    Raises:
        ValueError: If it is malformed.
    """
    return [numbers(entry) for entry in listed(path, record, "history")]


def _level(path: Path, record: dict[str, Any]) -> Level:
    size = numbers(mapping(path, record, "size"), finite=True)
    density, kept, prunable = number(record, "density"), size.get("kept"), size.get("prunable")
    if density is None and kept is not None and prunable:
        density = kept / prunable
    barriers = objects(path, record, "connectivity")
    return Level(
        level=whole(record, "level"),
        density=density,
        metrics=numbers(mapping(path, record, "metrics")),
        mask_hash=text(record, "mask_hash"),
        seconds=number(record, "seconds"),
        size=size,
        history=history(path, record),
        controls={
            printable(arm): numbers(mapping(path, trained, "metrics"))
            for arm, trained in objects(path, record, "controls").items()
        },
        diagnosis=numbers(mapping(path, record, "diagnosis")),
        orders=_barrier(barriers.get("orders", {})),
        last=_barrier(barriers.get("levels", {})),
        distances=column(record, "mask_distances"),
    )


def _barrier(record: dict[str, Any]) -> Barrier | None:
    height = number(record, "barrier", finite=False)
    return None if height is None else Barrier(height, number(record, "excess"), truth(record, "stable"))
