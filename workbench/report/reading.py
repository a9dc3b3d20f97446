"""The records of a run as typed, validated, ordered stages. A missing key is None or empty, never a guess."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
class Scored:
    """A network in a comparison.

    Attributes:
        name: The stage's, or stage/member.
        scores: Those that are known, by name.
        gain: Its accuracy less the baseline's.
        paired: Of that difference ``low``, ``high``, ``confidence``, ``p`` and ``p_holm``, where known.
        recall: By class, as the comparison lists them.
        gained: By class, the samples that it alone has right; the baseline's are ``lost``.
        lost: See there.
    """

    name: str
    scores: dict[str, float]
    gain: float | None
    paired: dict[str, float]
    recall: list[float | None]
    gained: list[float | None]
    lost: list[float | None]


@dataclass(frozen=True)
class Comparison:
    """What a compare stage found; ``classes`` are names of classes, ``counts`` their samples, ``of`` all there are."""

    split: str
    baseline: str | None
    n: float | None
    unit: str
    method: str | None
    teacher: Scored | None
    students: list[Scored]
    classes: list[str]
    counts: list[float | None]
    of: float | None


@dataclass(frozen=True)
class Member:
    """A network of a stage that trains several."""

    name: str
    metrics: dict[str, float]
    size: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """One stage's record.

    ``parents`` maps a role to the parent's name and fingerprint; ``family`` is the stage that a member's row is of.
    """

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
    members: list[Member]
    comparison: Comparison | None
    bytes: float | None
    samples: float | None
    family: str | None = None


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


def expand(stages: Iterable[Stage]) -> list[Stage]:
    """The stages, one that trained a family replaced by its members, named stage/member; each has its own arguments."""
    return [made for stage in stages for made in (_members(stage) or [stage])]


def _members(stage: Stage) -> list[Stage]:
    names = {member.name for member in stage.members}

    def own(value: Any, name: str) -> Any:
        return value[name] if isinstance(value, dict) and names <= set(value) else value

    return [
        replace(
            stage,
            name=f"{stage.name}/{member.name}",
            family=stage.name,
            arguments={key: own(value, member.name) for key, value in stage.arguments.items()},
            metrics=member.metrics,
            size=member.size,
            history=member.history,
            members=[],
        )
        for member in stage.members
    ]


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
        ready = (s for s in waiting if not any(_family(p) in names - {s.name} for p, _ in s.parents.values()))
        stage = next(ready, waiting[0])
        waiting.remove(stage)
        placed.append(stage)
    return placed


def _family(name: str) -> str:
    """The stage of ``stage/member``, or the name itself."""
    return name.partition("/")[0]


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
        members=[_member(path, name, entry) for name, entry in _objects(path, record, "students").items()],
        comparison=_comparison(path, _mapping(path, record, "comparison")),
        bytes=_number(record, "bytes"),
        samples=_number(record, "samples"),
    )


def _member(path: Path, name: str, record: dict[str, Any]) -> Member:
    size = _numbers(_mapping(path, record, "size"), finite=True)
    return Member(printable(name), _numbers(_mapping(path, record, "metrics")), size, _history(path, record))


def _comparison(path: Path, record: dict[str, Any]) -> Comparison | None:
    if not record:
        return None
    classes = _mapping(path, record, "per_class")
    by_class = _objects(path, classes, "students")
    students = _objects(path, record, "students")
    teacher = _mapping(path, record, "teacher")
    named = classes.get("names") or classes.get("classes")
    methods = (_text(_mapping(path, entry, "paired"), "method") for entry in students.values())
    return Comparison(
        split=_text(record, "split") or "test",
        baseline=_text(record, "baseline"),
        n=_number(record, "n"),
        unit=_text(record, "unit") or "samples",
        method=next((method for method in methods if method), None),
        teacher=_scored(path, _text(teacher, "name") or "teacher", teacher, {"recall": classes.get("teacher")}),
        students=[_scored(path, printable(name), s, by_class.get(name, {})) for name, s in students.items()],
        classes=[printable(str(name)) for name in named] if isinstance(named, list) else [],
        counts=_column(classes, "n"),
        of=_number(classes, "of"),
    )


def _scored(path: Path, name: str, record: dict[str, Any], by_class: dict[str, Any]) -> Scored:
    paired = _mapping(path, record, "paired")
    numbers = _numbers(record)
    gain = numbers.pop("gain", None)
    paired = {**_numbers(paired), **_numbers(_mapping(path, paired, "interval"))}
    recall, gained, lost = (_column(by_class, key) for key in ("recall", "gained", "lost"))
    return Scored(name, numbers, gain, paired, recall, gained, lost)


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


def _objects(path: Path, record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    found = _mapping(path, record, key)
    if not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f'{path}: "{key}" has an entry that is no object; a record holds objects there')
    return found


def _column(record: dict[str, Any], key: str) -> list[float | None]:
    """A list of numbers; what is none is None."""
    values = record.get(key)
    return [_number({"": value}, "") for value in values] if isinstance(values, list) else []


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
