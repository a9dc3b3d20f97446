"""Atomic writing, to a temporary name in the same folder, flushed to disk, then renamed; and reading of JSON."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; on success it is renamed to ``path``.

    On an exception the temporary is removed and ``path`` is untouched; a kill or a power cut at any moment leaves the
    old file or the new one, whole. Permissions are those of any new file of the user, also where the writer, as
    safetensors does, makes its files private.

    Args:
        path: The file; its folder is made if it is missing.
        durable: Flush to disk before and after the rename; otherwise a power cut, but no kill, may damage the file.

    Raises:
        OSError: If writing fails, e.g. on a full disk; it names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        mode = _mode_of_new(temporary)
        with path_in_errors(path):
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
            if durable:
                replace_durably(temporary, path)
            else:
                os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Inside, an ``OSError`` without a file name, as that of a full disk, is raised again with the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_durably(temporary: Path, path: Path) -> None:
    """Flush the complete file ``temporary`` to disk, rename it to ``path`` in the same folder, and flush the folder."""
    _flush(temporary)
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A temporary folder to write several files to; on success each is renamed to the same name in ``folder``.

    Each file is replaced as by :func:`atomic_file`; other files in ``folder`` stay. What an earlier, killed attempt
    left is removed.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        mode = _mode_of_new(part / "mode")
        yield part
        folder.mkdir(exist_ok=True)
        files = sorted(part.iterdir())
        for file in files:
            if file.stat().st_mode != mode:
                file.chmod(mode)
            _flush(file)
        # All files are on disk before the first rename: renames are quick, so few kills fall between two of them.
        for file in files:
            os.replace(file, folder / file.name)
        _sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path, kind: str, remedy: str = "") -> Any:
    """The JSON in ``path``.

    Args:
        path: The file.
        kind: What it should be, named in the error: "a compact checkpoint".
        remedy: What to do, named in the error too.

    Raises:
        ValueError: If it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}{remedy and '; ' + remedy}") from error


def write_json(path: Path, data: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write ``data`` as JSON, atomically; without ``indent`` on one line and without spaces."""
    text = json.dumps(data, indent=indent, separators=None if indent else (",", ":"))
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mode_of_new(path: Path) -> int:
    """Permissions that the user's umask gives a new file, found by making one at ``path`` and removing it."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _flush(file: Path) -> None:
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush a rename in ``folder`` to disk, on systems that can flush a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
