"""The four axes composed: criterion x structure x allocation at a density, model -> Masks."""

from prune.pruner.pruner import Axes, Pruner
from prune.pruner.scope import Patterns, prunable

__all__ = ["Axes", "Patterns", "Pruner", "prunable"]
