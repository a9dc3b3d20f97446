"""The record of a stage, ``record.json``: arguments, results and versions.

A folder without a record whose status is ``finished`` is unfinished by definition.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workbench.files import write_json

FORMAT = 2
"""Version of the format; a record of another one is refused."""
_PACKAGES = ("distill-prune", "torch", "lightning", "transformers", "torchmetrics", "numpy")


def fingerprint(data: Any) -> str:
    """SHA-256 of the canonical JSON of ``data``: the same for any order of its keys, in every process.

    Raises:
        ValueError: If ``data`` is not JSON: a mapping with string keys, list, string, number, bool or None.
    """
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"only JSON has a fingerprint ({error}): {str(data)[:200]}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return packages


def environment() -> dict[str, Any]:
    """The machine: platform, processor count, launcher's world size."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``, or None if there is none.

    Raises:
        ValueError: If the file is not a record of a format this version reads.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): move the folder aside to run the stage anew") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(_refused(path, record))
    return record


def _refused(path: Path, record: Any) -> str:
    """Why a record of another format cannot be read, and what to do."""
    number = record.get("format") if isinstance(record, dict) else type(record).__name__
    if type(number) is not int:
        return f"{path}: record format {number!r}, this version reads {FORMAT}: move the folder aside"
    versions = record.get("versions")
    package = versions.get("distill-prune") if isinstance(versions, dict) else None
    version_ = f"distill-prune {package}, record format {number}" if package else f"record format {number}"
    return (
        f"{path} was written by {'an earlier' if number < FORMAT else 'a later'} version ({version_}) and this version "
        f"reads format {FORMAT} only: choose another --out, or move {path.parent} aside"
    )


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into ``folder``, atomically."""
    write_json(folder / "record.json", {"format": FORMAT, **record})


def finished(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder`` if it is complete, else None."""
    record = read(folder)
    return record if record and record.get("status") == "finished" else None
