"""The grid of a sweep: its points and their names, which are folders too. Light: no torch."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from workbench import yaml_io
from workbench.messages import flatten

_LONGEST_VALUE = 32
_LONGEST = 120
_EXAMPLE = "{seed: [0, 1, 2]}"


@dataclass(frozen=True)
class Setting:
    """One point of a grid.

    Args:
        name: Name of the run and of its folder, e.g. ``activation-relu_seed-0``.
        values: Values by dotted key.
    """

    name: str
    values: dict[str, Any]


def settings(over: Any) -> list[Setting]:
    """The points of a grid, in order.

    A point's name depends on nothing but the grid's keys and the point's values, so that a run keeps its folder when
    values are added to the grid.

    Args:
        over: Lists of values by dotted key, of which every combination is a point, the last key varying fastest; or
            a list of points, each with values by dotted key.

    Raises:
        ValueError: If it is neither, has no value, or the same point twice.
    """
    points = list(_points(over))
    labels = _key_labels(list(dict.fromkeys(key for point in points for key in point)))
    named = [Setting(_name(point, labels), point) for point in points]
    names = [setting.name for setting in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"has '{twice[0]}' twice: give every combination of values once")
    return named


def _points(over: Any) -> Iterator[dict[str, Any]]:
    if isinstance(over, Mapping):
        axes = flatten(over)  # the command line writes a dotted key as mappings inside mappings
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"has {key}: {yaml_io.inline(values)}: give a list of values, e.g. {_EXAMPLE}")
        if axes:
            yield from (dict(zip(axes, values)) for values in itertools.product(*axes.values()))
            return
    elif isinstance(over, list) and over:
        for point in over:
            if not isinstance(point, Mapping) or not point:
                raise ValueError(
                    f"has the setting {yaml_io.inline(point)}: give values by key, e.g. {{seed: 0, density: 0.1}}"
                )
            yield {str(key): value for key, value in point.items()}
        return
    raise ValueError(f"is {yaml_io.inline(over)}: give lists of values by key, e.g. {_EXAMPLE}, or a list of settings")


def _key_labels(keys: Sequence[str]) -> dict[str, str]:
    """A short label for each key: its last part, or as many of its last parts as distinguish it from the others."""
    labels: dict[str, str] = {}
    for key in keys:
        parts = ["seed" if part == "seed_everything" else part for part in key.split(".")]
        size = next(n for n in range(1, len(parts) + 1) if n == len(parts) or _is_unique(parts[-n:], key, keys))
        labels[key] = _slug("-".join(parts[-size:]))
    return labels


def _is_unique(parts: Sequence[str], key: str, keys: Sequence[str]) -> bool:
    return not any(other != key and other.split(".")[-len(parts) :] == list(parts) for other in keys)


def _name(point: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    name = "_".join(f"{labels[key]}-{_value_label(value)}" for key, value in point.items())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{_digest(point)}"


def _value_label(value: Any) -> str:
    """The value itself if it can be part of a folder's name, else a readable part of it and a digest."""
    text = yaml_io.inline(value)
    slug = _slug(text)
    if slug == text and len(slug) <= _LONGEST_VALUE:
        return slug
    if isinstance(value, Mapping) and "class_path" in value:
        slug = _slug(str(value["class_path"]).rpartition(".")[2])
    elif isinstance(value, str):
        slug = _slug(PurePath(value).stem)
    return f"{slug[:_LONGEST_VALUE].rstrip('-')}-{_digest(value)}".lstrip("-")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip(".")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
