"""Weights under ``weight_norm``: every slice that has a norm keeps a weight.

The layer multiplies by g * v / ||v||, with one norm for each output. Without any weight v the norm is 0, and 0 / 0 is
NaN. So the best weight of every slice is kept, in the number that the density gives; other layers make up for it.
"""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from prune.schedule import kept
from prune.structures import Layout
from prune.structures.layout import Tensors
from workbench.messages import some
from workbench.models.matrices import Matrix


def needed(matrices: Mapping[str, Matrix], layout: Layout) -> dict[str, int]:
    """Key -> how many units it must keep, of weights under ``weight_norm``: one for each slice, or for those together
    whose weights are in the same units.
    """
    counts: dict[str, int] = {}
    for name, members in layout.members.items():
        if (matrix := matrices[name]).norm is not None:
            for key, index in members:
                counts[key] = len(matrix.slices(torch.empty(matrix.parameter.shape, device="meta")))
                if index is not None:
                    counts[key] = len(matrix.slices(index.expand(tuple(layout.shapes[name]))).unique(dim=0))
    return counts


def check_norms(matrices: Mapping[str, Matrix], layout: Layout, density: float) -> None:
    """Refuse a density at which not every slice that has a norm can keep a weight.

    Raises:
        ValueError: naming the weights.
    """
    counts = needed(matrices, layout)
    total = kept(sum(layout.units.values()), density)
    if counts and (least := sum(counts.values()) + len(layout.units) - len(counts)) > total:
        raise ValueError(
            f"density {density} keeps {total}, but {some(counts)} need {sum(counts.values())}, one an output, and "
            f"the other layers one each, {least} in all, under weight_norm: raise the density, exclude them, or remove "
            "the weight_norm"
        )


def keep_norms(
    matrices: Mapping[str, Matrix], layout: Layout, units: Tensors, unpruned: Tensors | None
) -> dict[str, Tensor]:
    """Scores of units, infinite for the best unit of every slice that has a norm.

    Args:
        matrices: parameter name -> matrix.
        layout: how they are divided.
        units: key -> scores.
        unpruned: key -> units that may be kept; None for all.
    """
    scores = dict(units)
    for name, members in layout.members.items():
        if (matrix := matrices[name]).norm is None:
            continue
        for key, index in members:
            here = scores[key]
            if unpruned is not None:
                here = here.masked_fill(~unpruned[key].to(here.device), -math.inf)
            numbers = torch.arange(here.numel(), device=here.device).view(here.shape) if index is None else index
            of_weight = numbers.to(here.device).expand(tuple(layout.shapes[name]))
            of_slice = matrix.slices(of_weight)
            best = of_slice.gather(1, here.flatten()[of_slice].argmax(1, keepdim=True)).flatten()
            raised = scores[key].flatten().clone()
            scores[key] = raised.index_fill_(0, best, math.inf).view(here.shape)
    return scores


def lifted(counts: Mapping[str, int], least: Mapping[str, int]) -> dict[str, int]:
    """``counts`` with none below ``least``; the others give up what that takes, in proportion to what they have over.

    Raises:
        ValueError: if they do not have as many.

    Warns:
        UserWarning: naming what was lifted.
    """
    raised = {key: max(count, least.get(key, 0)) for key, count in counts.items()}
    missing = sum(raised.values()) - sum(counts.values())
    if not missing:
        return dict(counts)
    spare = {key: raised[key] - max(1, least.get(key, 1)) for key in raised}
    total = sum(each for each in spare.values() if each > 0)
    names = [key for key in counts if raised[key] > counts[key]]
    if total < missing:
        raise ValueError(
            f"{some(names)} need {missing} more, one for each output under weight_norm, and the other layers "
            f"have {total} to give: raise the density, exclude them, or remove the weight_norm"
        )
    warnings.warn(
        f"{some(names)} keep {missing} more than the allocation gives them, one for each output under "
        "weight_norm; the other layers keep as many less",
        stacklevel=3,
    )
    taken = {key: missing * max(0, each) // total for key, each in spare.items()}
    rest = missing - sum(taken.values())
    for key in sorted(spare, key=lambda key: (taken[key] - spare[key], key))[:rest]:
        taken[key] += 1
    return {key: count - taken[key] for key, count in raised.items()}


def check_kept(matrices: Mapping[str, Matrix], masks: Tensors) -> None:
    """Refuse masks that leave a norm without weights.

    Raises:
        ValueError: naming the weight.
    """
    for name, mask in masks.items():
        matrix = matrices.get(name)
        if matrix is not None and matrix.norm is not None:
            empty = int((~matrix.slices(mask).any(1)).sum())
            if empty:
                raise ValueError(
                    f"'{name}' is under weight_norm, and {empty} of its outputs would keep no weight, which makes them "
                    "NaN: raise the density, exclude it, choose another structure, or remove the weight_norm"
                )
