"""One key of a record as its type: None or empty where it is missing, an error that names the file where it is none."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.messages import printable


def mapping(path: Path, record: dict[str, Any], key: str) -> dict[str, Any]:
    """An object.

    Raises:
        ValueError: If it is anything else.
    """
    value = record.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'{path}: "{key}" is {type(value).__name__}; a record holds an object there')
    return value or {}


def listed(path: Path, record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects.

    Raises:
        ValueError: If it is anything else.
    """
    value = record.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
        raise ValueError(f'{path}: "{key}" is not a list of objects, which is what a record holds there')
    return value or []


def objects(path: Path, record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """An object of objects.

    Raises:
        ValueError: If it is anything else.
    """
    found = mapping(path, record, key)
    if not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f'{path}: "{key}" has an entry that is no object; a record holds objects there')
    return found


def column(record: dict[str, Any], key: str) -> list[float | None]:
    """A list of numbers; what is none is None."""
    values = record.get(key)
    return [number({"": value}, "") for value in values] if isinstance(values, list) else []


def numbers(record: dict[str, Any], finite: bool = False) -> dict[str, float]:
    """The entries that are numbers; a metric may be infinite or not a number, and is shown so."""
    return {key: value for key in record if (value := number(record, key, finite)) is not None}


def number(record: dict[str, Any], key: str, finite: bool = True) -> float | None:
    """A number."""
    value = record.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or (finite and abs(value) > 1e300):
        return None
    return None if finite and not math.isfinite(value) else value


def whole(record: dict[str, Any], key: str) -> int | None:
    """A whole number."""
    value = number(record, key)
    return None if value is None else int(value)


def text(record: dict[str, Any], key: str) -> str | None:
    """A text that is not empty."""
    value = record.get(key)
    return printable(value) if isinstance(value, str) and value else None


def truth(record: dict[str, Any], key: str) -> bool | None:
    """True or false."""
    value = record.get(key)
    return value if isinstance(value, bool) else None


def monitored(path: Path, record: dict[str, Any]) -> tuple[str, str]:
    """Name and mode of the main metric; the loss where none is recorded.

    Raises:
        ValueError: If it is no pair of a name and a mode.
    """
    value = record.get("monitor")
    if value is None:
        return "loss", "min"
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1] in ("min", "max")):
        raise ValueError(f'{path}: "monitor" is {value!r}; allowed: a name and "min" or "max"')
    return printable(value[0].removeprefix("val/").removeprefix("test/")), value[1]


def time(record: dict[str, Any], key: str) -> datetime | None:
    """A time, in UTC where it names no zone."""
    try:
        found = datetime.fromisoformat(record.get(key) or "")
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def clean(value: Any) -> Any:
    """Every string, keys too, without characters that a terminal, an XML parser or UTF-8 refuses."""
    if isinstance(value, str):
        return "\n".join(printable(line) if not line.isprintable() else line for line in value.split("\n"))
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value
