"""What happens inside a network: dead units, gates, gradient flow; and a callback that logs them.

Names are imported on first use. The functions leave the network as it was.
"""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.diagnostics.callback import Diagnose
    from workbench.diagnostics.gradients import gradient_flow
    from workbench.diagnostics.units import dead_units, gate_statistics

__all__ = [
    "Diagnose",
    "dead_units",
    "gate_statistics",
    "gradient_flow",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "Diagnose": "workbench.diagnostics.callback",
        "dead_units": "workbench.diagnostics.units",
        "gate_statistics": "workbench.diagnostics.units",
        "gradient_flow": "workbench.diagnostics.gradients",
    },
)
