"""Callbacks that prune a network while it trains, keep it sparse, or watch what it would be pruned to.

They run in either Lightning namespace. Each drives a policy of ``prune.policies``, whose arguments it takes;
``PolicyCallback`` drives any other.
"""

from prune.callbacks.base import PolicyCallback
from prune.callbacks.earlybird import EarlyBird
from prune.callbacks.lottery import LotteryTicket
from prune.callbacks.pruning import DynamicSparsity, GradualPruning, KeepMasked

__all__ = ["DynamicSparsity", "EarlyBird", "GradualPruning", "KeepMasked", "LotteryTicket", "PolicyCallback"]
