"""Dataclasses to JSON and back: one generic reader that tolerates what a record lacks, and one strict check.

A record may come from another version, a stopped run or a stranger, so reading follows four rules by a field's type:

- a number, text or truth value that is missing or of another type is the field's default, else None where the type
  allows it, else "" for text; without any of these the whole object is unreadable, and is None or left out;
- a list of plain values keeps its places where texts or None can stand for what is unreadable; no list is an empty one;
- an object, a list of objects or an object of objects that is missing is empty or None;
- one that is of another type, such as a number, is an error that names the file and the key.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from workbench.messages import printable

RecordT = TypeVar("RecordT")
Unbounded = Annotated[float, "infinite and NaN too"]
"""A number that may be infinite or NaN, as a metric of a training that diverged; any other ``float`` is finite."""
Monitor = Annotated[tuple[str, str], "monitor"]
"""Name of the main metric, without split, and its better direction, ``"max"`` or ``"min"``."""
Metrics = dict[str, Unbounded]
"""Metrics by name with split, such as ``val/accuracy``."""


def encode(value: Any) -> Any:
    """A dataclass, and what it holds, as JSON; a field that is None by default and is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) is not None or field.default is not None
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode(kind: type[RecordT], record: Mapping[str, Any], path: Path) -> RecordT | None:
    """The object ``record`` of the file at ``path`` as ``kind``; None if it lacks what that cannot be without.

    Raises:
        ValueError: If an object or a list of objects in it is something else; names the file and the key.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, kind)):
        value = _read(_types(kind)[field.name], record.get(field.name), path, field.name)
        if value is None:
            value = _missing(field, _types(kind)[field.name])
        if value is dataclasses.MISSING:
            return None
        values[field.name] = value
    return kind(**values)


def problems(kind: Any, value: Any, where: str = "") -> list[str]:
    """What of ``value``, JSON that a job has written, does not have the type ``kind``, a dataclass or an annotation."""
    kind, optional = _without_none(kind)
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if value is None:
        return [] if optional or kind is Any else [f"{where} is null"]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            return [f"{where} is no object"]
        types_ = _types(cast(type, kind))
        wrong = [f"{where}.{key} is not in {cast(type, kind).__name__}" for key in value if key not in types_]
        for field in dataclasses.fields(cast(Any, kind)):
            if field.name in value:
                wrong += problems(types_[field.name], value[field.name], f"{where}.{field.name}")
            elif not _has_default(field):
                wrong.append(f"{where}.{field.name} is missing")
        return wrong
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        right = isinstance(value, list) and len(value) == len(inner) and all(isinstance(part, str) for part in value)
        return [] if right else [f"{where} is {value!r}, not {len(inner)} texts"]
    if origin in (list, dict):
        if not isinstance(value, list if origin is list else dict):
            return [f"{where} is {type(value).__name__}, not {origin.__name__}"]
        items = enumerate(value) if isinstance(value, list) else value.items()
        return [wrong for key, item in items for wrong in problems(inner[-1], item, f"{where}[{key!r}]")]
    if origin is Literal:
        return [] if value in inner else [f"{where} is {value!r}, none of {', '.join(map(repr, inner))}"]
    wanted = (int, float) if kind is float else kind
    if kind is Any or (isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))):
        return []
    return [f"{where} is {type(value).__name__}, not {kind.__name__}"]


def clean(value: Any) -> Any:
    """Every string, keys too, without characters that a terminal, an XML parser or UTF-8 refuses."""
    if isinstance(value, str):
        return "\n".join(printable(line) if not line.isprintable() else line for line in value.split("\n"))
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


def as_object(value: Any, path: Path, key: str) -> dict[str, Any]:
    """An object; empty if it is missing.

    Raises:
        ValueError: If it is anything else.
    """
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'{path}: "{key}" is {type(value).__name__}; a record holds an object there')
    return value or {}


def number(value: Any, finite: bool = True) -> float | None:
    """A number; None if it is none, or too large to be drawn where it has to be finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return None if finite and not (math.isfinite(value) and abs(value) <= 1e300) else value


def text(value: Any) -> str | None:
    """A text that is not empty, on one line."""
    return printable(value) or None if isinstance(value, str) else None


def _read(kind: Any, value: Any, path: Path, key: str) -> Any:
    """``value`` as the annotation ``kind``; None where it is missing or unreadable."""
    kind, _ = _without_none(kind)
    if kind == Monitor:
        return _monitor(value, path)
    if kind == Unbounded:
        return number(value, finite=False)
    if dataclasses.is_dataclass(kind):
        value = as_object(value, path, key)
        return decode(cast(type, kind), value, path) if value else None
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return _list(inner[0], value, path, key)
    if origin is dict:
        return _dict(inner[1], as_object(value, path, key), path, key)
    if kind is float:
        return number(value)
    if kind is int:
        parsed = number(value)
        return None if parsed is None else int(parsed)
    if kind is bool:
        return value if isinstance(value, bool) else None
    # A word that this version does not know is shown as it is, so a Literal reads as text.
    return text(value) if kind is str or origin is Literal else value


def _list(kind: Any, value: Any, path: Path, key: str) -> list[Any]:
    kind, optional = _without_none(kind)
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            raise ValueError(f'{path}: "{key}" is not a list of objects, which is what a record holds there')
        if dataclasses.is_dataclass(kind):
            entries = [decode(cast(type, kind), entry, path) for entry in value or ()]
            return [entry for entry in entries if entry is not None]
    entries = [_read(kind, entry, path, key) for entry in value] if isinstance(value, list) else []
    if kind is str and not optional:
        return [entry or "" for entry in entries]
    return entries if optional else [entry for entry in entries if entry is not None]


def _dict(kind: Any, value: dict[str, Any], path: Path, key: str) -> dict[str, Any]:
    kind, optional = _without_none(kind)
    if dataclasses.is_dataclass(kind):
        if not all(isinstance(entry, dict) for entry in value.values()):
            raise ValueError(f'{path}: "{key}" has an entry that is no object; a record holds objects there')
        entries = {name: decode(cast(type, kind), entry, path) for name, entry in value.items()}
    else:
        entries = {name: _read(kind, entry, path, key) for name, entry in value.items()}
    keep_none = optional or kind is Any
    return {printable(str(name)): entry for name, entry in entries.items() if keep_none or entry is not None}


def _monitor(value: Any, path: Path) -> tuple[str, str] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1] in ("min", "max")):
        raise ValueError(f'{path}: "monitor" is {value!r}; allowed: a name and "min" or "max"')
    return printable(value[0].removeprefix("val/").removeprefix("test/")), value[1]


def _missing(field: dataclasses.Field[Any], kind: Any) -> Any:
    """The substitute for an unreadable value; MISSING if there is none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    kind, optional = _without_none(kind)
    if optional:
        return None
    return "" if kind is str or get_origin(kind) is Literal else dataclasses.MISSING


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The annotation less None, and whether it allows None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    (inner,) = (each for each in get_args(kind) if each is not type(None))
    return inner, True
