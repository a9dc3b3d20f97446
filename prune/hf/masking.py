"""Masks that are given, or made on a schedule, in a transformers Trainer."""

import os
from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from prune.allocation import Allocation
from prune.hf.base import Driving
from prune.masks import Masks
from prune.masks.load import masks_of
from prune.policies import Dynamic, Fixed, Gradual
from prune.policies.dynamic import Decay, Growth
from prune.policies.gradual import Schedule
from prune.pruner import Patterns, Pruner, prunable
from workbench.duration import Duration


@final
class KeepMasked(Driving):
    """Fine-tunes a model that is sparse already: what is pruned is zero before the first step and after every one.

    ::

        masks = "checkpoint-500/masks.safetensors"  # or masks_of_zeros(model), where there is no such file
        Trainer(model, args, ..., callbacks=[KeepMasked(masks)]).train()

    Args:
        masks: Parameter name -> bool tensor, True where the weight is kept; or the path of a file that ``Masks.save``
            wrote, or of a compact checkpoint.

    Raises:
        ValueError: If the masks are not valid; when training starts, if they do not fit the model, ranks hold different
            ones, or a checkpoint is resumed that was trained under other masks.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        super().__init__(Fixed(masks_of(masks)), log=False)


@final
class GradualPruning(Driving):
    """Prunes a model while a Trainer trains it, on a schedule, and keeps what is pruned at zero.

    ::

        Trainer(model, args, ..., callbacks=[GradualPruning(0.2, "1ep", "3ep", "100it")]).train()

    Args:
        density: Share of the prunable weights to keep at the end, in (0, 1].
        begin: When to start, e.g. "1ep" or "500it": epochs or updates. 0 is before the first.
        end: When to be done, in the same unit.
        every: Time between two prunings, in either unit.
        pruner: Which weights go; the smallest of the whole model by default.
        initial: Density at ``begin``, in [density, 1].
        schedule: ``"cubic"``, ``"linear"``, ``"geometric"``, ``"one_shot"``, or a function; see
            :class:`prune.policies.Gradual`.
        batches: How many training batches a criterion looks at that looks at data.

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, if it ends before ``end``;
            in training, if a density cannot be met.

    Warns:
        UserWarning: By name, if a layer collapses, or frozen weights are pruned that ``include`` does not name; when
            training ends, if it did before ``end``.

    Reference: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, section 3.
    """

    def __init__(
        self,
        density: float,
        begin: str | Duration,
        end: str | Duration,
        every: str | Duration,
        pruner: Pruner | None = None,
        initial: float = 1.0,
        schedule: str | Schedule = "cubic",
        batches: int = 16,
    ) -> None:
        super().__init__(Gradual(density, begin, end, every, pruner, initial, schedule), batches=batches)


@final
class DynamicSparsity(Driving):
    """Trains a model that is sparse from the start, and moves its connections: RigL, or SET.

    ::

        Trainer(model, args, ..., callbacks=[DynamicSparsity(0.1, "0it", "750it", "100it")]).train()

    RigL looks at the gradients of all weights, averaged over micro-batches and ranks, before they are clipped.

    Args:
        density: Share of the prunable weights to keep, in (0, 1].
        begin: From when on connections move, e.g. "1ep" or "500it": epochs or updates.
        end: Until when, in the same unit; the paper has three quarters of training.
        every: Time between two changes, in either unit; the paper has 100 updates.
        growth: ``"rigl"`` (by gradient) or ``"set"`` (at random).
        fraction: Largest share of a layer's active weights that moves at once, in (0, 1].
        decay: ``"cosine"``, ``"constant"``, or a function of progress (0 to 1) that gives 0 to 1.
        allocation: How the density is divided over layers, as for ``Pruner``.
        include: As for ``Pruner``.
        exclude: As for ``Pruner``.
        output: As for ``Pruner``.
        seed: Of the first masks, and of what SET grows.

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, if it ends before
            ``begin``.

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134; Mocanu et al., 2018, arXiv:1707.04780.
    """

    def __init__(
        self,
        density: float,
        begin: str | Duration,
        end: str | Duration,
        every: str | Duration,
        growth: Growth = "rigl",
        fraction: float = 0.3,
        decay: str | Decay = "cosine",
        allocation: str | Allocation = "erk",
        include: Patterns = None,
        exclude: Patterns = None,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        moving = (growth, fraction, decay, allocation, include, exclude, output, seed)
        super().__init__(Dynamic(density, begin, end, every, *moving))


def masks_of_zeros(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> Masks:
    """Masks that prune whatever is zero in the prunable weights of a sparse model that came without its masks.

    A guess, to be made knowingly and once: a kept weight that happens to be 0 is pruned by it for good, and a weight
    that was pruned but has moved since is kept. Where the masks were saved, load them instead. Only the model as
    loaded is asked; masks never follow zeros that come later.

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
