"""Callbacks that prune a model, or keep it sparse, in a transformers Trainer.

They are named as their Lightning twins in ``prune`` are: ``from prune.hf import GradualPruning``. Each drives a policy
of ``prune.policies``, whose arguments it takes; ``PolicyCallback`` drives any other.
"""

from prune.hf.base import PolicyCallback
from prune.hf.lottery import LotteryTicket
from prune.hf.pruning import DynamicSparsity, GradualPruning, KeepMasked
from prune.hf.zeros import masks_of_zeros

__all__ = ["DynamicSparsity", "GradualPruning", "KeepMasked", "LotteryTicket", "PolicyCallback", "masks_of_zeros"]
