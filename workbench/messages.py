"""Words and numbers as a person reads them: nearest names, short lists, what differs, elapsed time."""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

_MOST, _LONGEST = 4, 60
_MISSING = object()


def elapsed(seconds: float) -> str:
    """A duration in words: ``3.1 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def printable(text: str) -> str:
    """The text on one line, every control, direction or unassigned character replaced by U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def nearest(word: object, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of ``words``, else `; allowed: ...` if they are few enough to read."""
    words = list(words)
    if close := closest(str(word), words):
        return f"; did you mean '{close}'?"
    return f"; allowed: {', '.join(words)}" if 0 < len(words) <= 20 else ""


def closest(word: str, words: Iterable[str], similarity: float = 0.5) -> str | None:
    """The one of ``words`` that is most like ``word``; None if none has that ``similarity``, from 0 to 1."""
    return next(iter(get_close_matches(word, list(words), 1, similarity)), None)


def some(names: Iterable[str]) -> str:
    """The first three, quoted; for error messages."""
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def flatten(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{above}.{name}" if above else str(name)
        flat |= flatten(value, key) if isinstance(value, Mapping) and value else {key: value}
    return flat


def difference(before: Mapping[str, Any], now: Mapping[str, Any], words: Mapping[str, str] | None = None) -> str:
    """The first settings that differ, for a message: ``rate 0.4 instead of 0.5, seed 1 instead of nothing``.

    Args:
        before: Nested or by dotted key, JSON values.
        now: Likewise.
        words: Dotted key -> the text to show instead of values that a person cannot read.

    Returns:
        At most four, by dotted key in their order; empty if nothing differs.
    """
    old, new = flatten(before), flatten(now)
    both = {**old, **new}
    # An empty mapping on one side, filled on the other: what fills it is what differs.
    filled = {key for key in both if both[key] == {} and any(other.startswith(f"{key}.") for other in both)}
    keys = [key for key in both if key not in filled and old.get(key, _MISSING) != new.get(key, _MISSING)]
    texts = [
        (words or {}).get(key) or f"{key} {_value(old.get(key, _MISSING))} instead of {_value(new.get(key, _MISSING))}"
        for key in keys
    ]
    return ", ".join(texts[:_MOST]) + (" and more" if len(texts) > _MOST else "")


def _value(value: Any) -> str:
    text = "nothing" if value is _MISSING else _text(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _text(value: Any) -> str:
    """As a recipe has it: ``[relu, gelu]``, ``null``, ``0.5``."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_text(item)}' for name, item in value.items())}}}"
    return json.dumps(value, default=str)
