"""Rows of text out of files, folders and the hub, each mistake in them named with its place."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.data.hub import is_hub_name, load_from_hub
from workbench.data.splits import WHOLE, Rows
from workbench.paths import resolve_path

_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test"}
_LINES = (".all", ".txt")
_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", *_LINES)


def read_text(path: Path) -> str:
    """A text file: UTF-8, or where it is not, Windows-1252 or Latin-1. A line feed ends a line.

    Raises:
        ValueError: If there is no such file, or it is empty or not text.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a text file.")
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path}: has zero bytes, so it is not a text file.")
    if not content.strip():
        raise ValueError(f"{path}: is empty; fetch the file again.")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return content.decode(encoding).replace("\r\n", "\n")
        except UnicodeDecodeError:
            pass
    return content.decode("latin-1").replace("\r\n", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and content of every line with something in it. Only a line feed ends a line, not every Unicode mark."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line := line.strip():
            yield number, line


def read_labelled(path: Path) -> Rows:
    """(text, label) of every line ``label text`` of a file.

    Raises:
        ValueError: If a line has only one word.
    """
    rows: Rows = []
    for number, line in read_lines(path):
        label, _, text = line.partition(" ")
        if not text.strip():
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is not 'label text'; give a label and a text a line."
            )
        rows.append((text.strip(), label))
    return rows


def read_rows(source: str | os.PathLike[str], columns: Sequence[str]) -> dict[str, Rows]:
    """The rows of every split, each a tuple in the order of ``columns``.

    A source is a file: JSON (a mapping of splits, or one list; rows are lists in the order of the columns, or
    mappings), JSON lines, CSV or TSV with a header, Parquet, or, for two columns, lines ``label text`` (.all, .txt); a
    folder of such files named train, val and test, or saved by `datasets`; or a data set of the hub, of whose
    configurations one is named after a colon (``clinc/clinc_oos:plus``).

    Args:
        source: Path, in which ``~`` and environment variables are replaced (see `workbench.paths`), or hub name.
        columns: Names of the columns; text and label, where there are two.

    Returns:
        Split -> rows; ``train``, ``val`` and ``test`` by these names, one that was not split as ``all``.

    Raises:
        ValueError: If there is no such source, or it is broken, or lacks a column.
    """
    path = Path(resolve_path(source))
    if path.is_file():
        splits = _file(path, columns)
    elif path.is_dir():
        splits = _folder(path, columns)
    elif not path.exists() and is_hub_name(str(source)):
        splits = _splits(load_from_hub(str(source)), columns, str(source))
    else:
        raise ValueError(f"{path}: no such file or folder, and no name of a data set of the hub.")
    return {_SPLITS.get(name, name): rows for name, rows in splits.items()}


def _file(path: Path, columns: Sequence[str]) -> dict[str, Rows]:
    if path.suffix == ".json":
        return _json(path, columns)
    if path.suffix == ".jsonl":
        return {WHOLE: _select_columns(_json_lines(path), columns, path)}
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(
            io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        try:
            return {WHOLE: _select_columns(table, columns, path)}
        except csv.Error as error:
            raise ValueError(f"{path}: cannot be read as a table ({error}).") from error
    if path.suffix == ".parquet":
        return {WHOLE: _select_columns(_parquet(path, columns), columns, path)}
    if path.suffix in _LINES and len(columns) == 2:
        return {WHOLE: read_labelled(path)}
    raise ValueError(f"{path}: a file of unknown kind; supported are {', '.join(_ENDINGS)}.")


def _json(path: Path, columns: Sequence[str]) -> dict[str, Rows]:
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); fetch the file again.") from error
    splits = content if isinstance(content, dict) else {WHOLE: content}
    if invalid := [name for name, rows in splits.items() if not isinstance(rows, list)]:
        raise ValueError(f"{path}: {invalid[0]!r} is not a list of rows.")
    return {name: _select_columns(rows, columns, f"{path}, {name!r}") for name, rows in splits.items()}


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in read_lines(path):
        try:
            yield json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is not JSON ({error}).") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Only what is there, so that a missing column is named where all others are.
            for batch in file.iter_batches(columns=[name for name in columns if name in names]):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}); fetch the file again.") from error


def _select_columns(rows: Iterable[Any], columns: Sequence[str], where: object) -> Rows:
    selected: Rows = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            if missing := [name for name in columns if row.get(name) is None]:
                raise ValueError(
                    f"{where}, row {number}: has no {missing[0]!r}, only {', '.join(map(repr, row))}: name the columns."
                )
            selected.append(tuple(row[name] for name in columns))
        elif isinstance(row, list) and len(row) == len(columns):
            selected.append(tuple(row))
        else:
            raise ValueError(f"{where}, row {number}: is not {', '.join(columns)} but {str(row)[:60]}.")
    if not selected:
        raise ValueError(f"{where}: has no rows.")
    return selected


def _folder(folder: Path, columns: Sequence[str]) -> dict[str, Rows]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        import datasets

        try:
            return _splits(datasets.load_from_disk(str(folder)), columns, str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: cannot be read as a saved data set ({error}).") from error
    places = ((name, folder / f"{name}{ending}") for name in _SPLITS for ending in _ENDINGS)
    files: dict[str, Path] = {}
    for name, path in places:
        if path.is_file():
            files.setdefault(_SPLITS[name], path)
    if "train" not in files:
        raise ValueError(f"{folder}: has no train file ({', '.join(f'train{ending}' for ending in _ENDINGS)}).")
    splits: dict[str, Rows] = {}
    for name, path in files.items():
        parts = _file(path, columns)
        if set(parts) != {WHOLE}:
            raise ValueError(f"{path}: contains the splits {', '.join(parts)}: give that file itself.")
        splits[name] = parts[WHOLE]
    return splits


def _splits(loaded: Any, columns: Sequence[str], where: str) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    for name, split in (loaded if isinstance(loaded, dict) else {WHOLE: loaded}).items():
        present = [column for column in columns if column in split.column_names]
        rows[str(name)] = _select_columns(iter(split.select_columns(present)), columns, f"{where}, {name!r}")
    return rows
