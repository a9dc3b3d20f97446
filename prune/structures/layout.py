"""What a structure says of a model: which unit each weight belongs to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed
from prune.topk import keep_top_k

Tensors = Mapping[str, Tensor]
Member = tuple[str, Tensor | None]


def only_living(units: Tensors, alive: Tensors | None) -> Tensors | None:
    """The candidates of most structures: whatever has not been pruned yet."""
    return alive


def best_of_each(units: Tensors, counts: Mapping[str, int], candidates: Tensors | None) -> dict[str, Tensor]:
    """The selection of most structures: the highest scores of every key, as many as its count, ties by index."""
    kept: dict[str, Tensor] = {}
    for key, scores in units.items():
        kept |= keep_top_k({key: scores}, counts[key], None if candidates is None else {key: candidates[key]})
    return kept


@final
@dataclass(frozen=True)
class Layout:
    """Weights divided into units that stand or fall together; scores go in by weight, and masks come out.

    Units are numbered from 0 within a *key*, and have weights in one or several parameters. A key is what a density
    is divided over, the same as a layer where each parameter is a key of its own: its name. A weight in several units
    (the output of one and the input of another) is kept if all of them are.

    Attributes:
        shapes: parameter name -> its shape, in the model's order. Weights that are not here are not pruned.
        members: parameter name -> pairs of a key and the number of the unit in it that each weight belongs to: an
            integer tensor that broadcasts to the parameter's shape (``arange(out)[:, None]`` for the rows of a
            matrix). None for one unit per weight: then the key is this parameter's alone. The numbers of a key run
            from 0 to one less than the count of its units, without gaps.
        densest: the highest density below 1 that the structure allows.
        candidates: ``candidates(units, alive)``: the units that may be kept, of those that are alive (None for all).
        select: ``select(units, counts, candidates)``: the units that are kept, ``counts[key]`` of each key.

    Raises:
        ValueError: if a unit has no weights, or an index does not fit its parameter.
    """

    shapes: Mapping[str, Sequence[int]]
    members: Mapping[str, Sequence[Member]]
    densest: Fraction = Fraction(1)
    candidates: Callable[[Tensors, Tensors | None], Tensors | None] = only_living
    select: Callable[[Tensors, Mapping[str, int], Tensors | None], dict[str, Tensor]] = best_of_each

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
    def matrices(self) -> dict[str, list[Sequence[int]]]:
        """Key -> the shapes of the parameters that its units lie in."""
        found: dict[str, list[Sequence[int]]] = {}
        for name, members in self.members.items():
            for key in dict.fromkeys(key for key, _ in members):
                found.setdefault(key, []).append(self.shapes[name])
        return found

    @cached_property
    def _sizes(self) -> dict[str, Tensor]:
        """Key -> number of weights of each unit, of the keys whose units are not single weights."""
        found: dict[str, Tensor] = {}
        for name, members in self.members.items():
            for key, index in members:
                if index is not None:
                    repeats = math.prod(self.shapes[name]) // index.numel()
                    known = found.get(key, index.new_zeros(0))
                    sizes = index.flatten().bincount(minlength=len(known)) * repeats
                    sizes[: len(known)] += known
                    found[key] = sizes
        return found

    def pool(self, scores: Tensors, within: Tensors | None = None) -> dict[str, Tensor]:
        """Scores of units: the mean over a unit's weights, those pruned in ``within`` counting as 0.

        Units of many weights are pooled in float64, to the CPU; a sharded tensor is gathered for it. Units of one
        weight keep their scores as they are.

        Args:
            scores: parameter name -> scores of its shape; other names are not looked at.
            within: masks of the level before; scores where they are False are not looked at.

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
        return {key: total / self._sizes[key] if key in self._sizes else total for key, total in pooled.items()}

    def alive(self, within: Tensors | None) -> dict[str, Tensor] | None:
        """Key -> which units have a weight left in ``within``; None if ``within`` is None."""
        if within is None:
            return None
        living: dict[str, Tensor] = {}
        for name, members in self.members.items():
            for key, index in members:
                if index is None:
                    living[key] = within[name]
                else:
                    flags = living.setdefault(key, torch.zeros(self.units[key], dtype=torch.bool))
                    flags[index[_any(within[name], index)]] = True
        return living

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
    """Says what stands or falls together."""

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """How ``weights``, parameters of ``model`` by their names in it, divide into units.

        Weights that the structure says nothing of are left out.

        Raises:
            ValueError: if a weight cannot be divided so, or no weight is covered.
        """
        ...


def whole(tensor: Any) -> Tensor:
    """A plain tensor: of one sharded over ranks all of it, which every rank must ask for."""
    return tensor.full_tensor() if distributed(tensor) else tensor


def _fits(index: Tensor, shape: Sequence[int]) -> bool:
    return index.dim() == len(shape) and all(n in (1, size) for n, size in zip(index.shape, shape))


def _repeated(index: Tensor) -> list[int]:
    """The axes along which neighbours share their unit."""
    return [axis for axis, length in enumerate(index.shape) if length == 1]


def _summed(score: Tensor, index: Tensor) -> Tensor:
    """Scores in the index's shape, on the CPU, so that no device adds in an order of its own."""
    score = score.cpu() if score.device.type == "mps" else score  # which has no float64
    axes = _repeated(index)
    return (score.sum(axes, keepdim=True, dtype=torch.float64) if axes else score.double()).cpu()


def _any(mask: Tensor, index: Tensor) -> Tensor:
    axes = _repeated(index)
    return (mask.amax(axes, keepdim=True) if axes else mask).cpu()
