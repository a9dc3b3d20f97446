"""The policies as callbacks, in either Lightning namespace."""

import hashlib
import os
from collections.abc import Mapping
from typing import final

from torch import Tensor

from prune.allocation import Allocation
from prune.callbacks.base import Sparsifying
from prune.masks import Masks
from prune.masks.load import masks_of
from prune.policies import Dynamic, Fixed, Gradual
from prune.policies.dynamic import Decay, Growth
from prune.policies.gradual import Schedule
from prune.pruner import Patterns, Pruner
from workbench.duration import Duration


@final
class KeepMasked(Sparsifying):
    """Trains under a fixed mask: pruned weights are zero before the first step and after every one.

    What is resumed under another mask of the same weights than it was trained under is refused. Several may keep
    several parts of a network.

    Args:
        masks: Parameter name of the module's ``network`` (or of the module itself, if it has none) -> bool tensor; or
            the path of a file that ``Masks.save`` wrote, or of a compact checkpoint.

    Raises:
        ValueError: If the masks are not valid; when training starts, as every callback here.
    """

    def __init__(self, masks: Masks | Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        given = masks_of(masks)
        names = hashlib.sha256("\n".join(sorted(given)).encode()).hexdigest()
        super().__init__(Fixed(given), log=False, part=f", {len(given)} weights {names[:8]}")


@final
class GradualPruning(Sparsifying):
    """Prunes a network while it trains, on a schedule, and keeps what is pruned at zero.

    It drives a :class:`prune.policies.Gradual`. A second ``fit`` goes on from the masks held, if the network still
    obeys them; another network starts dense.

    Args:
        density: Share of the prunable weights to keep at the end, in (0, 1].
        begin: When to start, e.g. "1ep" or "500it": epochs, or updates as ``trainer.global_step`` counts them, where
            each step of each of several optimizers is one. 0 is before the first.
        end: When to be done, in the same unit.
        every: Time between two prunings, in either unit.
        pruner: Which weights go; the smallest of the whole network by default. It looks at the module's ``network``,
            or at all of the module if it has none.
        initial: Density at ``begin``, in [density, 1].
        schedule: ``"cubic"``, ``"linear"``, ``"geometric"``, ``"one_shot"``, or a function of progress (0 to 1),
            ``density`` and ``initial``.
        batches: How many training batches a criterion looks at that looks at data.

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, if it ends before ``end``,
            or as every callback here; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, if a layer collapses; when training ends, if it did before ``end``.

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
        policy = Gradual(density, begin, end, every, pruner, initial, schedule)
        super().__init__(policy, part=_part(policy.pruner), batches=batches)


@final
class DynamicSparsity(Sparsifying):
    """Trains a network that is sparse from the start, and moves its connections: RigL, or SET.

    It drives a :class:`prune.policies.Dynamic`, which says how. A second ``fit`` goes on from the masks held, if the
    network still obeys them; another network starts with random masks.

    Args:
        density: Share of the prunable weights to keep, in (0, 1].
        begin: From when on connections move, e.g. "1ep" or "500it": epochs, or updates as ``trainer.global_step``
            counts them.
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
            ``begin``, or as every callback here.

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
        policy = Dynamic(density, begin, end, every, *moving)
        super().__init__(policy, part=_part(policy.pruner))


def _part(pruner: Pruner) -> str:
    chosen = {"include": pruner.include, "exclude": pruner.exclude}
    return "".join(f", {word} {list(patterns)}" for word, patterns in chosen.items() if patterns)
