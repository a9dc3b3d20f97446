"""Callbacks that make or keep a network sparse, or watch what it would be pruned to, in a training of your own.

They run in either Lightning namespace.
"""

from prune.callbacks.earlybird import EarlyBird
from prune.callbacks.lottery import LotteryTicket
from prune.callbacks.masking import DynamicSparsity, GradualPruning, KeepMasked

__all__ = ["DynamicSparsity", "EarlyBird", "GradualPruning", "KeepMasked", "LotteryTicket"]
