"""The records of a run as typed, validated, ordered stages. A missing key is None or empty, never a guess."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench import records
from workbench.progress import printable

LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Level:
    """One level of a hunt; densities are kept / prunable weights."""

    level: int | None
    density: float | None
    metrics: dict[str, float]
    mask_hash: str | None
    seconds: float | None
    size: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Export:
    """One file or folder that an export stage wrote."""

    format: str | None
    bytes: float | None
    largest_difference: float | None
    same_predictions: bool | None


@dataclass(frozen=True)
class Stage:
    """One stage's record. ``parents`` maps a role to the parent's name and fingerprint."""

    name: str
    job: str | None
    status: str | None
    fingerprint: str | None
    arguments: dict[str, Any]
    seed: int | None
    parents: dict[str, tuple[str, str | None]]
    versions: dict[str, Any]
    environment: dict[str, Any]
    started: datetime | None
    seconds: float | None
    metrics: dict[str, float]
    monitor: tuple[str, str]
    size: dict[str, float]
    history: list[dict[str, float]]
    levels: list[Level]
    exports: list[Export]


def read(run: Path, own: Path | None = None) -> list[Stage]:
    """The stages under the folder ``run``, parents first, otherwise by the time they started.

    Args:
        run: A folder that holds one folder per stage.
        own: A stage's folder to leave out: the report that is being written.

    Raises:
        ValueError: If there is no such folder, no record in it, or a malformed one; names the file.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder: give the folder that a recipe was run into")
    skip = None if own is None else own.resolve()
    stages: dict[str, Stage] = {}
    for folder in sorted(run.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir() or folder.resolve() == skip:
            continue
        path, record = folder / "record.json", _read(folder)
        if record is None:
            continue
        stage = _stage(path, folder.name, record)
        if stage.name in stages:
            raise ValueError(f"{path}: a second stage called {stage.name!r} in this run; move one folder away")
        stages[stage.name] = stage
    if not stages:
        raise ValueError(
            f"no record.json in a folder of {run}: run a recipe into it, `lightning run RECIPE --out {run}`"
        )
    return _ordered(stages)


def _read(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``, its text cleaned of control characters, or None if there is none."""
    try:
        record = records.read(folder)
        return None if record is None else _clean(record)
    except RecursionError:
        raise ValueError(f"{folder / 'record.json'}: nested too deeply to be a record; move the folder away") from None


def _ordered(stages: Mapping[str, Stage]) -> list[Stage]:
    """Earliest first among those whose parents are already placed; times are to the second and may tie."""
    waiting = sorted(stages.values(), key=lambda s: (s.started or LAST, s.name))
    placed: list[Stage] = []
    while waiting:
        names = {s.name for s in waiting}
        ready = (s for s in waiting if not any(p in names and p != s.name for p, _ in s.parents.values()))
        stage = next(ready, waiting[0])
        waiting.remove(stage)
        placed.append(stage)
    return placed


def _stage(path: Path, folder: str, record: dict[str, Any]) -> Stage:
    """The record at ``path`` as a stage."""
    parents = {
        role: (_text(parent, "stage") or "", _text(parent, "fingerprint"))
        for role, parent in _mapping(path, record, "parents").items()
        if isinstance(parent, dict)
    }
    seed = record.get("seed")
    return Stage(
        name=printable(_text(record, "stage") or folder),
        job=_text(record, "job"),
        status=_text(record, "status"),
        fingerprint=_text(record, "fingerprint"),
        arguments=_mapping(path, record, "arguments"),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        parents={role: (printable(name), print_) for role, (name, print_) in parents.items() if name},
        versions=_mapping(path, record, "versions"),
        environment=_mapping(path, record, "environment"),
        started=_time(record.get("started")),
        seconds=_number(record, "seconds"),
        metrics=_numbers(_mapping(path, record, "metrics")),
        monitor=_monitor(path, record.get("monitor")),
        size=_numbers(_mapping(path, record, "size"), finite=True),
        history=_history(path, record),
        levels=[_level(path, level) for level in _list(path, record, "levels")],
        exports=[_export(export) for export in _list(path, record, "exports")],
    )


def _level(path: Path, record: dict[str, Any]) -> Level:
    size = _numbers(_mapping(path, record, "size"), finite=True)
    density, kept, prunable = _number(record, "density"), size.get("kept"), size.get("prunable")
    if density is None and kept is not None and prunable:
        density = kept / prunable
    number = _number(record, "level")
    return Level(
        level=None if number is None else int(number),
        density=density,
        metrics=_numbers(_mapping(path, record, "metrics")),
        mask_hash=_text(record, "mask_hash"),
        seconds=_number(record, "seconds"),
        size=size,
        history=_history(path, record),
    )


def _export(record: dict[str, Any]) -> Export:
    same = record.get("same_predictions")
    return Export(
        format=_text(record, "format"),
        bytes=_number(record, "bytes"),
        largest_difference=_number(record, "largest_difference"),
        same_predictions=same if isinstance(same, bool) else None,
    )


def _history(path: Path, record: dict[str, Any]) -> list[dict[str, float]]:
    return [_numbers(entry) for entry in _list(path, record, "history")]


def _monitor(path: Path, value: Any) -> tuple[str, str]:
    """Name and mode of the main metric; the loss where none is recorded."""
    if value is None:
        return "loss", "min"
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1] in ("min", "max")):
        raise ValueError(f'{path}: "monitor" is {value!r}; allowed: a name and "min" or "max"')
    return printable(value[0].removeprefix("val/").removeprefix("test/")), value[1]


def _mapping(path: Path, record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'{path}: "{key}" is {type(value).__name__}; a record holds an object there')
    return value or {}


def _list(path: Path, record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = record.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise ValueError(f'{path}: "{key}" is not a list of objects, which is what a record holds there')
    return value or []


def _numbers(mapping: dict[str, Any], finite: bool = False) -> dict[str, float]:
    """The entries that are numbers; a metric may be infinite or not a number, and is shown so."""
    return {key: number for key in mapping if (number := _number(mapping, key, finite)) is not None}


def _number(mapping: dict[str, Any], key: str, finite: bool = True) -> float | None:
    value = mapping.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or (finite and abs(value) > 1e300):
        return None
    return None if finite and not math.isfinite(value) else value


def _text(mapping: dict[str, Any], key: str) -> str | None:
    value = mapping.get(key)
    return printable(value) if isinstance(value, str) and value else None


def _time(value: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _clean(value: Any) -> Any:
    """Every string, keys too, without characters that a terminal, an XML parser or UTF-8 refuses."""
    if isinstance(value, str):
        return "\n".join(printable(line) if not line.isprintable() else line for line in value.split("\n"))
    if isinstance(value, dict):
        return {_clean(key): _clean(entry) for key, entry in value.items()}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value
