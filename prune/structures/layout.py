"""Layouts: which unit each weight of a model belongs to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed
from prune.topk import keep_top_k

Tensors = Mapping[str, Tensor]
Member = tuple[str, Tensor | None]


def all_unpruned(units: Tensors, unpruned: Tensors | None) -> Tensors | None:
    """The candidates of most structures: all units that have not been pruned yet."""
    return unpruned


def best_of_each(units: Tensors, counts: Mapping[str, int], candidates: Tensors | None) -> dict[str, Tensor]:
    """The selection of most structures: the highest scores of every key, as many as its count, ties by index."""
    kept: dict[str, Tensor] = {}
    for key, scores in units.items():
        kept |= keep_top_k({key: scores}, counts[key], None if candidates is None else {key: candidates[key]})
    return kept


@final
@dataclass(frozen=True)
class Layout:
    """Weights divided into units that are kept or pruned together: scores of weights in, masks of weights out.

    The way of a mask::

        scores of weights ─ pool ─► scores of units ─ candidates, allocation, select ─► kept units ─ spread ─► masks

    A density is divided over *keys*. Where no unit spans two parameters, a key is the parameter's name; where
    units span several parameters, these share one key. Units are numbered from 0 within a key.

    Invariants, checked when a layout is made:

    - ``shapes`` and ``members`` name the same parameters; those that are not named are never pruned;
    - an index broadcasts to its parameter's shape, so every weight is in one unit of every key of its parameter;
    - the numbers of a key have no gaps: every unit has at least one weight, in at least one parameter.

    A weight in several units (the output of one and the input of another) is kept if all of them are. So masks are
    exact in units, and the share of weights may be lower than the density.

    Attributes:
        shapes: parameter name -> its shape, in the model's order.
        members: parameter name -> pairs of a key and an index, the unit of the key that each weight belongs to: int64,
            broadcasts to the parameter's shape (``arange(out)[:, None]`` for the rows of a matrix). An index of None
            makes every weight a unit; no other parameter may have that key.
        densest: the highest density below 1 that the structure allows, n/m for N:M.
        candidates: ``candidates(scores of units, unpruned units)``: the units that may be kept (None for all).
        select: ``select(scores of units, counts, candidates)``: the kept units, ``counts[key]`` of each key.
        left: parameter name -> why the structure does not fit it, so that it is not pruned, in words.

    Raises:
        ValueError: if a unit has no weights, or an index does not fit its parameter.
    """

    shapes: Mapping[str, Sequence[int]]
    members: Mapping[str, Sequence[Member]]
    densest: Fraction = Fraction(1)
    candidates: Callable[[Tensors, Tensors | None], Tensors | None] = all_unpruned
    select: Callable[[Tensors, Mapping[str, int], Tensors | None], dict[str, Tensor]] = best_of_each
    left: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.members or self.members.keys() != self.shapes.keys():
            raise ValueError(f"members are of {list(self.members)}, shapes of {list(self.shapes)}: give both of all")
        for name, members in self.members.items():
            for key, index in members:
                if index is not None and not _fits(index, self.shapes[name]):
                    shapes = f"{tuple(index.shape)}, the weight {tuple(self.shapes[name])}"
                    raise ValueError(f"the units of '{key}' in '{name}' have shape {shapes}: give one that broadcasts")
        for key, sizes in self._sizes.items():
            if not bool((sizes > 0).all()):
                raise ValueError(f"units {(sizes == 0).nonzero().flatten().tolist()} of '{key}' have no weights")

    @cached_property
    def units(self) -> dict[str, int]:
        """Key -> number of its units, in the order in which the keys come up in ``members``."""
        return {
            key: math.prod(self.shapes[name]) if index is None else len(self._sizes[key])
            for name, members in self.members.items()
            for key, index in members
        }

    @cached_property
    def _sizes(self) -> dict[str, Tensor]:
        """Key -> number of weights of each unit, of the keys whose units are not single weights."""
        sizes: dict[str, Tensor] = {}
        for name, members in self.members.items():
            for key, index in members:
                if index is not None:
                    repeats = math.prod(self.shapes[name]) // index.numel()
                    so_far = sizes.get(key, index.new_zeros(0))
                    here = index.flatten().bincount(minlength=len(so_far)) * repeats
                    here[: len(so_far)] += so_far
                    sizes[key] = here
        return sizes

    @property
    def groups_weights(self) -> bool:
        """Whether there are units of several weights."""
        return bool(self._sizes)

    def pool(
        self, scores: Tensors, within: Tensors | None = None, form: Literal["mean", "sum"] = "mean"
    ) -> dict[str, Tensor]:
        """Scores of units: the mean or the sum over a unit's weights, those pruned in ``within`` counting as 0.

        Units of many weights are pooled in float64 on the CPU, for which a sharded tensor is gathered. Single weights
        keep their scores.

        Args:
            scores: parameter name -> scores of its shape; other names are ignored.
            within: masks of the level before; scores where they are False are ignored.
            form: "mean" or "sum".

        Returns:
            Key -> scores, [units] or, of single weights, of the parameter's shape.
        """
        pooled: dict[str, Tensor] = {}
        for name, members in self.members.items():
            for key, index in members:
                if index is None:
                    pooled[key] = scores[name]
                    continue
                score = whole(scores[name])
                if within is not None:
                    score = score.masked_fill(~within[name].to(score.device), 0)
                total = pooled.setdefault(key, torch.zeros(self.units[key], dtype=torch.float64))
                total.index_add_(0, index.flatten(), _summed(score, index).flatten())
        if form == "sum":
            return pooled
        return {key: total / self._sizes[key] if key in self._sizes else total for key, total in pooled.items()}

    def unpruned(self, within: Tensors | None) -> dict[str, Tensor] | None:
        """Key -> which units have a weight left in ``within``; None if ``within`` is None."""
        if within is None:
            return None
        unpruned: dict[str, Tensor] = {}
        for name, members in self.members.items():
            for key, index in members:
                if index is None:
                    unpruned[key] = within[name]
                else:
                    flags = unpruned.setdefault(key, torch.zeros(self.units[key], dtype=torch.bool))
                    flags[index[_any(within[name], index)]] = True
        return unpruned

    def spread(self, kept: Tensors, within: Tensors | None = None) -> dict[str, Tensor]:
        """Masks of weights from kept units, nested in ``within``: parameter name -> bool of its shape."""
        masks: dict[str, Tensor] = {}
        for name, members in self.members.items():
            parts = [kept[key] if index is None else kept[key][index] for key, index in members]
            parts += [] if within is None else [within[name].to(parts[0].device)]
            mask = parts[0]
            for part in parts[1:]:
                mask = mask & part
            masks[name] = mask.expand(*self.shapes[name])
        return masks


class Structure(Protocol):
    """Divides the weights of a model into units."""

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """The units of ``weights``, parameters of ``model`` by their names in it.

        Weights that the structure does not cover are left out.

        Raises:
            ValueError: if a weight cannot be divided, or no weight is covered.
        """
        ...


def whole(tensor: Any) -> Tensor:
    """A plain tensor; a sharded one is gathered, which every rank must call."""
    return tensor.full_tensor() if distributed(tensor) else tensor


def _fits(index: Tensor, shape: Sequence[int]) -> bool:
    return index.dim() == len(shape) and all(n in (1, size) for n, size in zip(index.shape, shape))


def _repeated(index: Tensor) -> list[int]:
    """The axes along which all weights belong to the same unit."""
    return [axis for axis, length in enumerate(index.shape) if length == 1]


def _summed(score: Tensor, index: Tensor) -> Tensor:
    """Scores summed to the index's shape, in float64, on the CPU: atomic adds on a GPU would have no fixed order."""
    score = score.cpu() if score.device.type == "mps" else score  # MPS has no float64
    axes = _repeated(index)
    return (score.sum(axes, keepdim=True, dtype=torch.float64) if axes else score.double()).cpu()


def _any(mask: Tensor, index: Tensor) -> Tensor:
    axes = _repeated(index)
    return (mask.amax(axes, keepdim=True) if axes else mask).cpu()
