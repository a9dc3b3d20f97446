"""Structures whose units are single weights: any of them, some of every group, equally many of every output."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prune.structures.axes import layer_of, shape_of, turned
from prune.structures.layout import Layout, Tensors, whole
from prune.topk import keep_top_k


@dataclass(frozen=True)
class Unstructured:
    """Every weight stands for itself."""

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight."""
        return _single(weights)


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` neighbours along the input axis are kept: the best of them, ties by index.

    At density n/m these are all; below it weights compete as in :class:`Unstructured`, but only these. In a
    convolution neighbours are input channels at one place of the kernel.

    Attributes:
        n: how many of a group may be kept, from 1 to below m.
        m: the size of a group.

    References: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3; Zhou et
    al., Learning N:M fine-grained structured sparse neural networks from scratch, 2021, arXiv:2102.04010, equation 1.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(f"{self.n}:{self.m} is no N:M structure: keep from 1 to below m of every m, such as 2:4")

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight, of which at most n of every m are candidates.

        Raises:
            ValueError: if m does not divide the inputs of a layer.
        """
        layers = {name: layer_of(model, name) for name in weights}
        inputs = {name: shape_of(layers[name], weight)[1] for name, weight in weights.items()}
        if odd := {name: count for name, count in inputs.items() if count % self.m}:
            raise ValueError(
                f"{self.n}:{self.m} needs inputs in groups of {self.m}, but these layers have other numbers of them: "
                f"{odd}; exclude them, or choose another m"
            )
        return _single(weights, Fraction(self.n, self.m), candidates=partial(self._best, layers))

    def _best(self, layers: Mapping[str, nn.Module], scores: Tensors, alive: Tensors | None) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, layer in layers.items():
            score = whole(scores[name])
            living = torch.ones_like(score, dtype=torch.bool) if alive is None else alive[name].to(score.device)
            better = _better(self._grouped(layer, score), self._grouped(layer, living))
            masks[name] = living & turned(layer, (better < self.n).flatten(-2).movedim(-1, 1))
        return masks

    def _grouped(self, layer: nn.Module, tensor: Tensor) -> Tensor:
        return turned(layer, tensor).movedim(1, -1).unflatten(-1, (-1, self.m))


@dataclass(frozen=True)
class Balanced:
    """Every output of a layer keeps equally many of its inputs, but for one more that the best-scored ones get.

    An output with fewer left in ``within`` keeps them all. In a convolution an input is one weight of a filter.

    Reference: Sun et al., A simple and effective pruning approach for large language models (Wanda), 2023,
    arXiv:2306.11695, section 3 (comparison per output).
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight, selected output by output."""
        return _single(weights, select=partial(_best_of_outputs, {name: layer_of(model, name) for name in weights}))


def ranks(scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """The place of every score in its row, from 0, the highest first, ties by index; those not alive come last.

    Args:
        scores: floating, [*, n].
        alive: bool, [*, n]; None for all.

    Returns:
        int64, [*, n].
    """
    if alive is not None:
        scores = scores.masked_fill(~alive, -torch.inf)
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    if alive is not None and bool((scores.isneginf() & alive).any()):
        order = order.gather(-1, torch.argsort((~alive).gather(-1, order).byte(), dim=-1, stable=True))
    places = torch.arange(scores.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _better(scores: Tensor, alive: Tensor) -> Tensor:
    """How many living neighbours [..., m] are better, or as good and come first: for a few, faster than to sort."""
    scores, alive = (tensor.movedim(-1, 0).contiguous() for tensor in (scores, alive))
    found = torch.zeros_like(scores, dtype=torch.int16)
    for i, (other, living) in enumerate(zip(scores, alive)):
        found[:i] += living & (other > scores[:i])
        found[i + 1 :] += living & (other >= scores[i + 1 :])
    return found.movedim(0, -1)


def _single(weights: Tensors, densest: Fraction = Fraction(1), **rules: Any) -> Layout:
    return Layout({n: w.shape for n, w in weights.items()}, {n: [(n, None)] for n in weights}, densest, **rules)


def _best_of_outputs(
    layers: Mapping[str, nn.Module], scores: Tensors, counts: Mapping[str, int], alive: Tensors | None
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, layer in layers.items():
        score, k = whole(scores[name]), counts[name]
        living = torch.ones_like(score, dtype=torch.bool) if alive is None else alive[name].to(score.device)
        rows = [turned(layer, tensor).flatten(1) for tensor in (score, living)]
        place = turned(layer, ranks(*rows).unflatten(1, shape_of(layer, score)[1:]))
        # How many weights there are with a place up to this one: all places that fit are filled, then the best of one.
        filled = place[living].bincount().cumsum(0)
        full = int((filled <= k).sum())
        rest = k - (int(filled[full - 1]) if full else 0)
        masks[name] = living & (place < full)
        if rest:
            masks[name] |= keep_top_k({name: score}, rest, {name: living & (place == full)})[name]
    return masks
