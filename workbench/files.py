"""Writing that is all or nothing: a temporary name in the same folder, flushed to disk, then renamed."""

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
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of the file ``path`` to write to; on success it takes the place of ``path``.

    On an exception the temporary is removed and whatever was at ``path`` is untouched; a kill or a power cut at any
    moment leaves the old file or the new one, whole. Permissions are those of any new file of the user, also where
    the writer, as safetensors does, makes its files private.

    Raises:
        OSError: If writing fails, a full disk say; it names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        mode = _mode_of_new(temporary)
        with naming(path):
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
            publish(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an ``OSError`` that names no file, as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(temporary: Path, path: Path) -> None:
    """Flush a whole file to disk and let it take the place of ``path`` in the same folder, which is flushed too."""
    _flush(temporary)
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder for several files; on success each takes the place of its namesake in ``folder``.

    Each file is replaced as by :func:`replacing`; what was in ``folder`` under other names stays. What an earlier,
    killed attempt left is removed.
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
        for file in files:
            os.replace(file, folder / file.name)
        _sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write ``data`` as JSON, atomically; without ``indent`` on one line and without spaces."""
    text = json.dumps(data, indent=indent, separators=None if indent else (",", ":"))
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mode_of_new(path: Path) -> int:
    """Permissions that a new file at ``path`` gets; it is removed again."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _flush(file: Path) -> None:
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlive a power cut, on the systems that let a folder be flushed."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
