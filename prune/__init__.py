"""Pruning: masks, what decides them, and the hunt for lottery tickets.

Names are loaded on first use: masks and criteria need torch only, and ``import prune`` nothing at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune.accounting import account
    from prune.callbacks import DynamicSparsity, EarlyBird, GradualPruning, KeepMasked, LotteryTicket
    from prune.hunting.function import find_tickets
    from prune.masks import Masks
    from prune.pruner import Pruner
    from prune.rewind import RewindPoint
    from prune.shrinking import Coupled, Shrunk, shrink
    from prune.snapshot import Snapshot
    from prune.ticket import hunt

__all__ = [
    "Coupled",
    "DynamicSparsity",
    "EarlyBird",
    "GradualPruning",
    "KeepMasked",
    "LotteryTicket",
    "Masks",
    "Pruner",
    "RewindPoint",
    "Shrunk",
    "Snapshot",
    "account",
    "find_tickets",
    "hunt",
    "shrink",
]

_HOME = {
    "Coupled": "prune.shrinking",
    "DynamicSparsity": "prune.callbacks",
    "EarlyBird": "prune.callbacks",
    "GradualPruning": "prune.callbacks",
    "KeepMasked": "prune.callbacks",
    "LotteryTicket": "prune.callbacks",
    "Masks": "prune.masks",
    "Pruner": "prune.pruner",
    "RewindPoint": "prune.rewind",
    "Shrunk": "prune.shrinking",
    "Snapshot": "prune.snapshot",
    "account": "prune.accounting",
    "find_tickets": "prune.hunting.function",
    "hunt": "prune.ticket",
    "shrink": "prune.shrinking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
