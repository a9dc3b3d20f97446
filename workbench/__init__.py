"""Models, data, tasks, training and the run on disk, which distillation and pruning share.

Names are imported on first use, so that listing recipes or printing help imports neither torch nor lightning.
"""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.checkpoints.compact import load, save
    from workbench.models.activations import swap_activation
    from workbench.training.module import TaskModule

__all__ = [
    "TaskModule",
    "load",
    "save",
    "swap_activation",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "TaskModule": "workbench.training.module",
        "load": "workbench.checkpoints.compact",
        "save": "workbench.checkpoints.compact",
        "swap_activation": "workbench.models.activations",
    },
)
