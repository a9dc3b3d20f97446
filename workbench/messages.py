"""Words and numbers as a person reads them: nearest names, short lists, elapsed time."""

from collections.abc import Iterable
from difflib import get_close_matches


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
    """`; did you mean 'x'?` for the closest of ``words``, else the list of them if it is short enough to read."""
    words = list(words)
    if close := get_close_matches(str(word), words, 1, 0.5):
        return f"; did you mean '{close[0]}'?"
    return f"; allowed: {', '.join(words)}" if 0 < len(words) <= 20 else ""


def some(names: Iterable[str]) -> str:
    """The first three, quoted; for error messages."""
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
