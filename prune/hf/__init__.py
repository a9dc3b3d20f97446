"""Callbacks that make or keep a network sparse in a transformers Trainer.

They are named as their Lightning twins in ``prune`` are: ``from prune.hf import GradualPruning``.
"""

from prune.hf.masking import GradualPruning, KeepMasked, masks_of_zeros

__all__ = ["GradualPruning", "KeepMasked", "masks_of_zeros"]
