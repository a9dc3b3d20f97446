"""Linear mode connectivity: the error barrier between trained networks of one architecture.

Everything but ``error_barrier``, which needs Lightning and is imported on first use, needs torch only.
"""

from typing import TYPE_CHECKING, Any

from prune.connectivity.interpolation import Barrier, barrier, interpolate
from prune.connectivity.states import recalibrate_batch_norms, temporary_states

if TYPE_CHECKING:
    from prune.connectivity.lightning import error_barrier

__all__ = [
    "Barrier",
    "barrier",
    "error_barrier",
    "interpolate",
    "recalibrate_batch_norms",
    "temporary_states",
]


def __getattr__(name: str) -> Any:
    if name != "error_barrier":
        raise AttributeError(f"module 'prune.connectivity' has no attribute {name!r}")
    from prune.connectivity.lightning import error_barrier

    return error_barrier
