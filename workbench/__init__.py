"""The bench both crafts stand at: models, data, tasks, training, the run on disk.

Names are loaded on first use, so that listing recipes or printing help imports neither torch nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.checkpoints.compact import load, save
    from workbench.models.activations import swap_activation
    from workbench.training.module import TaskModule

__all__ = ["TaskModule", "load", "save", "swap_activation"]

_HOME = {
    "TaskModule": "workbench.training.module",
    "load": "workbench.checkpoints.compact",
    "save": "workbench.checkpoints.compact",
    "swap_activation": "workbench.models.activations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
