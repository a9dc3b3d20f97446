"""What is going on inside a network: units that say nothing, gates, gradient flow; and a callback that logs them.

The functions leave the network as it was; the callback is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from workbench.diagnostics.gradients import gradient_flow
from workbench.diagnostics.units import dead_units, gate_statistics

if TYPE_CHECKING:
    from workbench.diagnostics.callback import Diagnose

__all__ = ["Diagnose", "dead_units", "gate_statistics", "gradient_flow"]


def __getattr__(name: str) -> Any:
    if name != "Diagnose":
        raise AttributeError(f"module 'workbench.diagnostics' has no attribute {name!r}")
    from workbench.diagnostics.callback import Diagnose

    return Diagnose
