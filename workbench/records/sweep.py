"""What the runs of a sweep came to, of the record of job ``sweep`` and of the runs' own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import yaml_io
from workbench.messages import printable
from workbench.records.estimates import Estimate, estimates
from workbench.records.fields import listed, mapping, monitored, number, numbers, text, whole
from workbench.records.levels import Level


@dataclass(frozen=True)
class Run:
    """One run of a sweep; ``over`` are the values that make it this one, ``levels`` those of a hunt that were read."""

    name: str
    folder: str | None
    over: dict[str, str]
    fingerprint: str | None
    status: str
    error: str | None
    attempts: int | None
    seconds: float | None
    metrics: dict[str, float]
    monitor: tuple[str, str]
    levels: list[Level]


@dataclass(frozen=True)
class OverSeeds:
    """The runs of one setting: how many, and their metrics' means."""

    over: dict[str, str]
    n: int | None
    metrics: dict[str, Estimate]


def runs(path: Path, record: dict[str, Any]) -> list[Run]:
    """The entry ``runs`` of the record at ``path``, without levels.

    Raises:
        ValueError: If it is malformed.
    """
    return [
        Run(
            name=text(entry, "name") or f"run {place}",
            folder=_folder(entry.get("folder")),
            over=_over(path, entry),
            fingerprint=text(entry, "fingerprint"),
            status=text(entry, "status") or "not known",
            error=text(entry, "error"),
            attempts=whole(entry, "attempts"),
            seconds=number(entry, "seconds"),
            metrics=numbers(mapping(path, entry, "metrics")),
            monitor=monitored(path, entry),
            levels=[],
        )
        for place, entry in enumerate(listed(path, record, "runs"))
    ]


def over_seeds(path: Path, record: dict[str, Any]) -> list[OverSeeds]:
    """The entry ``summary`` of the record at ``path``.

    Raises:
        ValueError: If it is malformed.
    """
    found = []
    for entry in listed(path, record, "summary"):
        n = whole(entry, "n")
        found.append(OverSeeds(_over(path, entry), n, estimates(path, entry, "metrics", n)))
    return found


def _over(path: Path, record: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> value in words."""
    return {printable(key): printable(yaml_io.inline(value)) for key, value in mapping(path, record, "over").items()}


def _folder(value: Any) -> str | None:
    """The name of a folder beside the record; None if it is anywhere else."""
    return value if isinstance(value, str) and value not in ("", "..") and Path(value).name == value else None
