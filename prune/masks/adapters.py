"""Merging adapters into a network that stays as sparse as its masks say."""

from typing import Any

from torch import nn

from prune.masks.masks import Masks
from workbench.models.wrappers import has_adapters, named_modules, unwrap


def merge_adapters(model: nn.Module, masks: Masks) -> nn.Module:
    """The network with its adapters of PEFT (LoRA, DoRA, IA3, ...) merged into its weights, under its masks.

    ``merge_and_unload`` of PEFT adds B A to a weight, which is dense: what was pruned is filled in. Here masked weights
    are zero afterwards. So the network answers differently than with its adapters beside it, by their part at pruned
    weights: score what comes out, and train it on under ``KeepMasked(masks)`` if it has lost.

    Args:
        model: A model with adapters, also in a wrapper. Its layers are those of what is returned: it is used up.
        masks: Of the network's weights, by names with or without those of the adapters.

    Returns:
        The network without adapters.

    Raises:
        ValueError: If there are none, they are no part of a layer's weights (prompts, prefixes), or masks do not fit.
    """
    model = unwrap(model)
    merge: Any = getattr(model, "merge_and_unload", None)
    if not has_adapters(model):
        raise ValueError(f"this {type(model).__name__} has no adapters of PEFT: masks.apply(model) is all it needs")
    if merge is None or not any(hasattr(module, "merge") for _, module in named_modules(model, adapted=True)):
        raise ValueError(
            f"the adapters of this {type(model).__name__} are not part of a layer's weights, or were put in without "
            "peft.get_peft_model: only what has merge_and_unload() can be merged"
        )
    merged = merge()
    masks.apply(merged)
    return merged
