"""Masks of a sparse model that came without them."""

from torch import nn

from prune.masks import Masks
from prune.pruner import Patterns, prunable


def masks_of_zeros(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> Masks:
    """Masks that prune every zero in the prunable weights of ``model``, as it was loaded.

    A guess: a kept weight that happens to be 0 is pruned for good, and a weight that was pruned but has moved since is
    kept. Where the masks were saved, load them instead. Masks never follow zeros that come later.

    Args:
        model: Sparse already.
        include: Name patterns (``fnmatch``); only prunable weights that match one are masked. None for all.
        exclude: Name patterns; weights that match one are not masked.

    Raises:
        ValueError: If a pattern matches nothing, or no weight is zero: then the model is dense.
    """
    weights = prunable(model, include, exclude)
    masks = Masks({name: weight.detach() != 0 for name, weight in weights.items()})
    if masks.density == 1:
        raise ValueError(
            f"none of the {sum(mask.numel() for mask in masks.values())} prunable weights of this "
            f"{type(model).__name__} is zero: it is dense; prune it, or give the model that was"
        )
    return masks
