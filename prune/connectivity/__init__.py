"""How trained networks of one architecture lie to each other: the line between their weights, and their masks.

Everything but ``between``, which is loaded on first use, needs torch only.
"""

from typing import TYPE_CHECKING, Any

from prune.connectivity.agreement import Agreement, agreement, layer_agreements
from prune.connectivity.line import Barrier, barrier, interpolated
from prune.connectivity.visiting import refresh_statistics, visiting

if TYPE_CHECKING:
    from prune.connectivity.lightning import between

__all__ = [
    "Agreement",
    "Barrier",
    "agreement",
    "barrier",
    "between",
    "interpolated",
    "layer_agreements",
    "refresh_statistics",
    "visiting",
]


def __getattr__(name: str) -> Any:
    if name != "between":
        raise AttributeError(f"module 'prune.connectivity' has no attribute {name!r}")
    from prune.connectivity.lightning import between

    return between
