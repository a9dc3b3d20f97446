"""The compact checkpoint: bit-packed masks and the values that were kept. Names are imported on first use."""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.checkpoints.compact import load, masks, save, tensors
    from workbench.checkpoints.int8 import Int8Linear, quantize

__all__ = [
    "Int8Linear",
    "load",
    "masks",
    "quantize",
    "save",
    "tensors",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "Int8Linear": "workbench.checkpoints.int8",
        "load": "workbench.checkpoints.compact",
        "masks": "workbench.checkpoints.compact",
        "quantize": "workbench.checkpoints.int8",
        "save": "workbench.checkpoints.compact",
        "tensors": "workbench.checkpoints.compact",
    },
)
