"""Linear mode connectivity: the error barrier between trained networks of one architecture.

Everything but ``between``, which is loaded on first use, needs torch only.
"""

from typing import TYPE_CHECKING, Any

from prune.connectivity.line import Barrier, barrier, interpolated
from prune.connectivity.visiting import refresh_statistics, visiting

if TYPE_CHECKING:
    from prune.connectivity.lightning import between

__all__ = [
    "Barrier",
    "barrier",
    "between",
    "interpolated",
    "refresh_statistics",
    "visiting",
]


def __getattr__(name: str) -> Any:
    if name != "between":
        raise AttributeError(f"module 'prune.connectivity' has no attribute {name!r}")
    from prune.connectivity.lightning import between

    return between
