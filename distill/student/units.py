"""Selects the layers and units of a teacher that a student keeps. Torch only."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def chosen_layers(count: int, layers: Sequence[int] | None, every: int | None) -> list[int]:
    """The layers to keep, out of ``count``."""
    if layers is not None and every is not None:
        raise ValueError(f"layers={list(layers)} and every={every}: give one of them")
    if every is not None and not 1 <= every <= max(count, 1):
        raise ValueError(f"every={every}: the teacher has {count} layers, give 1 to {count}")
    if layers is None:
        return list(range(0, count, every or 1))
    chosen = list(layers)
    if missing := [layer for layer in chosen if not 0 <= layer < count]:
        raise ValueError(f"layers={chosen}: the teacher has no layer {missing[0]}, only 0 to {count - 1}")
    if not chosen or any(a >= b for a, b in pairwise(chosen)):
        raise ValueError(f"layers={chosen}: give at least one, each once and in ascending order")
    return chosen


def keep(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores along the last axis, ascending; ties to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def norms(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """L2 norms of the rows [out, ...], each with its bias; in float64."""
    rows = weight.detach().double().flatten(1)
    if bias is not None:
        rows = torch.cat([rows, bias.detach().double()[:, None]], 1)
    return rows.norm(dim=1)


def smaller(name: str, size: int, own: int) -> int:
    """``size``, checked: one that the teacher's ``own`` can be cut to."""
    if not 1 <= size <= own:
        raise ValueError(f"{name}={size}: the teacher has {own}, give 1 to {own}")
    return size
