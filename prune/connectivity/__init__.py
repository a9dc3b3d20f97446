"""Linear mode connectivity: the error barrier between trained networks of one architecture.

Everything but ``error_barrier``, which needs Lightning and is imported on first use, needs torch only.
"""

from typing import TYPE_CHECKING

from prune.connectivity.interpolation import Barrier, barrier, interpolate
from prune.connectivity.states import recalibrate_batch_norms, temporary_states
from workbench import lazy

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

__getattr__ = lazy.attach(__name__, {"error_barrier": "prune.connectivity.lightning"})[0]
