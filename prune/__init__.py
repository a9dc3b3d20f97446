"""Pruning: masks, what decides them, and the hunt for lottery tickets.

Names are loaded on first use: masks and criteria need torch only, and ``import prune`` nothing at all.
"""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from prune.accounting import account
    from prune.callbacks import DynamicSparsity, EarlyBird, GradualPruning, KeepMasked, LotteryTicket
    from prune.levels import Levels
    from prune.masks import Masks
    from prune.masks.adapters import merge_adapters
    from prune.pruner import Pruner
    from prune.rewinding.lightning import RewindPoint
    from prune.rewinding.modes import Rewind
    from prune.rewinding.snapshot import Snapshot
    from prune.shrinking import Coupled, Shrunk, shrink
    from prune.tickets.controls import Controls
    from prune.tickets.find import find_tickets
    from prune.tickets.hunt import hunt

__all__ = [
    "Controls",
    "Coupled",
    "DynamicSparsity",
    "EarlyBird",
    "GradualPruning",
    "KeepMasked",
    "Levels",
    "LotteryTicket",
    "Masks",
    "Pruner",
    "Rewind",
    "RewindPoint",
    "Shrunk",
    "Snapshot",
    "account",
    "find_tickets",
    "hunt",
    "merge_adapters",
    "shrink",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "Controls": "prune.tickets.controls",
        "Coupled": "prune.shrinking",
        "DynamicSparsity": "prune.callbacks",
        "EarlyBird": "prune.callbacks",
        "GradualPruning": "prune.callbacks",
        "KeepMasked": "prune.callbacks",
        "Levels": "prune.levels",
        "LotteryTicket": "prune.callbacks",
        "Masks": "prune.masks.masks",
        "Pruner": "prune.pruner",
        "Rewind": "prune.rewinding.modes",
        "RewindPoint": "prune.rewinding.lightning",
        "Shrunk": "prune.shrinking",
        "Snapshot": "prune.rewinding.snapshot",
        "account": "prune.accounting",
        "find_tickets": "prune.tickets.find",
        "hunt": "prune.tickets.hunt",
        "merge_adapters": "prune.masks.adapters",
        "shrink": "prune.shrinking",
    },
)
