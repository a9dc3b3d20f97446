"""Callbacks that make or keep a network sparse in a training somebody already has, in either Lightning namespace."""

from prune.callbacks.lottery import LotteryTicket
from prune.callbacks.masking import DynamicSparsity, GradualPruning, KeepMasked

__all__ = ["DynamicSparsity", "GradualPruning", "KeepMasked", "LotteryTicket"]
