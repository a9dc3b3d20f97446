"""The ``.ts`` files of the UEA and UCR archives of time series."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from workbench.data.series.values import parse_number
from workbench.data.text.reading import read_lines

Row = tuple[np.ndarray, str]

_KEYS = (
    *("problemname", "timestamps", "missing", "univariate", "dimension", "dimensions", "equallength", "serieslength"),
    *("classlabel", "targetlabel"),
)
_DIGITS = 20
_TRAIN, _TEST = "_TRAIN.ts", "_TEST.ts"


class TsFile(NamedTuple):
    """What a ``.ts`` file holds.

    Args:
        classes: Names of the classes, in the order of its header.
        rows: A series, float64 [L, F], missing values NaN, and its class; in the order of the file.
    """

    classes: tuple[str, ...]
    rows: list[Row]


class _Header(NamedTuple):
    """What the header states about all series; None if it does not."""

    classes: tuple[str, ...]
    dimensions: int | None
    length: int | None
    equal: bool
    missing: bool


def read_ts(path: Path) -> TsFile:
    """Read a ``.ts`` file of labelled series, and check it against its header.

    Lines that begin with ``#`` are comments, with ``@`` the header, which ends with ``@data``. Every line after that is
    a series: its dimensions, divided by colons, each a list of numbers between commas, ``?`` a missing one; then its
    class. Series may differ in length, unless the header has ``@equalLength true``, the dimensions of one may not.
    https://www.aeon-toolkit.org/en/stable/api_reference/file_specifications/ts.html

    Raises:
        ValueError: No such file, or one with another content, with the number of the line.
    """
    lines = read_lines(path)
    header = _header(path, lines)
    rows: list[Row] = []
    for line_number, line in lines:
        if line.startswith("#"):
            continue
        where = f"{path}, line {line_number}"
        rows.append(_row(line, header, where))
        values = rows[-1][0]
        # What the header leaves open, the first series settles.
        header = header._replace(dimensions=header.dimensions or values.shape[1])
        if header.equal:
            header = header._replace(length=header.length or len(values))
    if not rows:
        raise ValueError(f"{path}: has no series after @data; fetch the file again.")
    return TsFile(header.classes, rows)


def find_ts(folder: Path) -> tuple[Path, Path] | None:
    """The pair NAME_TRAIN.ts and NAME_TEST.ts in a folder; None if it holds no ``.ts`` file at all.

    Raises:
        ValueError: If there are several pairs, or only half of one.
    """
    files = sorted(folder.glob("*.ts"))
    if not files:
        return None
    trains = [file for file in files if file.name.endswith(_TRAIN)]
    if len(trains) != 1:
        value = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: has {value}, not one NAME{_TRAIN}: give the path of the training file itself.")
    test = test_file_of(trains[0])
    if test is None:
        raise ValueError(f"{folder}: has {trains[0].name} without its {_TEST}: put it there, or give the file itself.")
    return trains[0], test


def test_file_of(train: Path) -> Path | None:
    """NAME_TEST.ts beside a file NAME_TRAIN.ts, where it is there."""
    test = train.with_name(train.name.removesuffix(_TRAIN) + _TEST)
    return test if train.name.endswith(_TRAIN) and test.is_file() else None


def _header(path: Path, lines: Iterator[tuple[int, str]]) -> _Header:
    """Everything up to ``@data``."""
    fields: dict[str, list[str]] = {}
    for line_number, line in lines:
        if line.startswith("#"):
            continue
        where = f"{path}, line {line_number}"
        key, *words = line.split()
        name = key.removeprefix("@").lower()
        if not key.startswith("@"):
            raise ValueError(f"{where}: {line[:40]!r} is before @data; this is another kind of file.")
        if name == "data":
            return _check_header(path, fields)
        if name not in _KEYS or name in fields:
            what = "a second time" if name in fields else f"which is none of {', '.join(_KEYS)}"
            raise ValueError(f"{where}: the header has {key}, {what}: mend it.")
        if not words and name != "problemname":
            raise ValueError(f"{where}: the header has {key} without a value: mend it.")
        fields[name] = words
    raise ValueError(f"{path}: has no line @data, so it is no .ts file, or ends inside its header; fetch it again.")


def _check_header(path: Path, fields: dict[str, list[str]]) -> _Header:
    if _flag(path, fields, "timestamps"):
        raise ValueError(f"{path}: has time stamps, @timeStamps true, which are not read: give series at even steps.")
    if not _flag(path, fields, "classlabel"):
        raise ValueError(f"{path}: has no classes (@classLabel true NAME NAME ...): give a file for classification.")
    classes = tuple(fields["classlabel"][1:])
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"{path}: @classLabel names {' '.join(classes) or 'none'}: two classes or more, each once.")
    dimensions = _size(path, fields, "dimensions") or _size(path, fields, "dimension")
    if _flag(path, fields, "univariate"):
        if (dimensions or 1) != 1:
            raise ValueError(f"{path}: has @univariate true and @dimensions {dimensions}: mend the header.")
        dimensions = 1
    equal = _flag(path, fields, "equallength")
    length = _size(path, fields, "serieslength") if equal else None
    return _Header(classes, dimensions, length, equal, _flag(path, fields, "missing", True))


def _flag(path: Path, fields: dict[str, list[str]], name: str, default: bool = False) -> bool:
    if name not in fields:
        return default
    value = fields[name][0].lower()
    if value not in ("true", "false"):
        raise ValueError(f"{path}: the header has @{name} {value}, expected true or false: mend it.")
    return value == "true"


def _size(path: Path, fields: dict[str, list[str]], name: str) -> int | None:
    if name not in fields:
        return None
    value = fields[name][0]
    if not (value.isascii() and value.isdecimal() and len(value) < _DIGITS) or int(value) < 1:
        raise ValueError(f"{path}: the header has @{name} {value[:40]}, expected a number of at least 1: mend it.")
    return int(value)


def _row(line: str, header: _Header, where: str) -> Row:
    *channels, label = (part.strip() for part in line.split(":"))
    wanted = header.dimensions or max(len(channels), 1)
    if len(channels) != wanted:
        raise ValueError(
            f"{where}: has {len(channels)} dimensions before the class, expected {wanted}: mend that line or header."
        )
    if label not in header.classes:
        raise ValueError(f"{where}: the class is {label[:40]!r}, and @classLabel names {' '.join(header.classes)}.")
    texts = [channel.split(",") for channel in channels]
    if any(not text.strip() for each in texts for text in each):
        raise ValueError(f"{where}: nothing is between two commas or colons: write ? for a missing value.")
    lengths = sorted({len(each) for each in texts})
    if len(lengths) > 1:
        raise ValueError(
            f"{where}: its dimensions have {lengths[0]} to {lengths[-1]} numbers: bring them to one length."
        )
    if header.length is not None and lengths[0] != header.length:
        raise ValueError(f"{where}: has {lengths[0]} steps, and by the header all have {header.length}: mend either.")
    try:
        values = np.array([[parse_number(text) for text in each] for each in texts]).T
    except ValueError as error:
        raise ValueError(f"{where}: {error}; mend that line.") from error
    if not header.missing and np.isnan(values).any():
        raise ValueError(f"{where}: a value is missing, and the header has @missing false: set it to true.")
    return values, label
