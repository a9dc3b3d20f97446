"""Callbacks that make or keep a network sparse in a transformers Trainer.

They are named as their Lightning twins in ``prune`` are: ``from prune.hf import GradualPruning``.
"""

from prune.hf.lottery import LotteryTicket
from prune.hf.masking import DynamicSparsity, GradualPruning, KeepMasked, masks_of_zeros

__all__ = ["DynamicSparsity", "GradualPruning", "KeepMasked", "LotteryTicket", "masks_of_zeros"]
