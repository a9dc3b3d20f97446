"""The structure whose units can be removed from a network whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from prune.shrinking.equivalence import Call, outputs_of, tolerances, within_tolerances
from prune.shrinking.find import find_groups
from prune.shrinking.surgery import keep_one, remove, zero_columns
from prune.shrinking.units import Group, Selection, Side, Slot
from prune.shrinking.unused import randomized
from prune.structures.layout import Layout, Member, Tensors
from workbench.models.copying import copied
from workbench.models.resize import axes
from workbench.models.wrappers import submodule


@dataclass(frozen=True, eq=False)
class Coupled:
    """Dependency groups: all rows that produce a channel and all columns that consume it are one unit.

    What `prune.shrink` can remove exactly: hidden units, channels of convolutions, those of a residual stream together
    in all its layers, groups of a GroupNorm, feed-forward units and heads of transformers. Inputs and outputs of the
    network are no units, nor are channels that a LayerNorm mixes; weights that are in no unit are not covered.

    Attributes:
        example_inputs: what the model is called with, to trace it: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. For recipes: a list of whole numbers, the shape of a batch of numbers, such as
            [2, 3, 32, 32]; and lists for tensors in a mapping, such as {input_ids: [[1, 2, 3]]}.

    Source: Fang et al., DepGraph: Towards any structural pruning, 2023, arXiv:2301.12900, section 3.

    When to use: to remove channels and not only zero them: a smaller and faster network without sparse kernels.
    """

    example_inputs: Any

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each channel that can be removed, of the key that is the first layer that produces it.

        Raises:
            ValueError: if the model cannot be called or traced with the example inputs, or no weight is in a unit.
        """
        traced = copied(model).eval()
        for parameter in traced.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        call = Call.of(_as_tensors(self.example_inputs)).on_device_of(model)
        outputs_of(traced, [call])  # refuses inputs that do not fit, before the tracer's less helpful message
        groups = _removable(traced, find_groups(traced, call), [call, call.randomized()])
        members = _members(model, weights, groups)
        if not members:
            raise ValueError(
                f"no channel of {type(model).__name__} among these weights can be removed without changing what the "
                "network takes or returns, or what is normalised with it: choose another structure, or loosen include "
                "and exclude"
            )
        return Layout({name: weights[name].shape for name in members}, members)


def _as_tensors(inputs: Any) -> Any:
    """Inputs as a recipe writes them, as tensors."""
    if isinstance(inputs, Mapping):
        return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)) and inputs and all(type(size) is int for size in inputs):
        return torch.randn(*inputs, generator=torch.Generator().manual_seed(0))
    return inputs


def _removable(model: nn.Module, groups: list[Group], calls: Sequence[Call]) -> list[Group]:
    """The groups of which every other unit can be removed when no layer reads it."""

    def removable(some: Sequence[Group]) -> bool:
        selections = [Selection(group, torch.arange(len(group)) % 2 == 0) for group in some]
        unread = copied(model)
        for group, mask in selections:
            for slot in group.consumers:
                zero_columns(unread, slot, mask)
        expected = outputs_of(unread, calls)
        eps = max(torch.finfo(value.dtype).eps for value in expected if value.is_floating_point())
        allowed = tolerances(expected, eps)
        try:
            # Random producers: what they compute must not matter, wherever it might be read.
            other = outputs_of(randomized(unread, selections), calls)
            remove(unread, keep_one(selections), {})
            return within_tolerances(expected, other, allowed) and within_tolerances(
                expected, outputs_of(unread, calls), allowed
            )
        except ValueError:  # a forward pass that expects the original shapes
            return False

    # All at once first: to try each alone costs a forward pass or three for every group.
    return groups if removable(groups) else [group for group in groups if removable([group])]


class _Part(NamedTuple):
    """A slot of the group with this number."""

    group: int
    slot: Slot


class _Axis(NamedTuple):
    """A dimension of a weight, and the slots that divide it into units."""

    dim: int
    parts: list[_Part]


def _members(model: nn.Module, weights: Tensors, groups: Sequence[Group]) -> dict[str, list[Member]]:
    """Parameter name -> the keys and units that its weights belong to."""
    parts: dict[tuple[str, Side], list[_Part]] = {}
    for number, group in enumerate(groups):
        for slot in group.slots:
            parts.setdefault((slot.layer, slot.side), []).append(_Part(number, slot))
    divided: dict[str, list[_Axis]] = {}
    for name in weights:
        layer = submodule(model, name.rpartition(".")[0])
        outputs, inputs = axes(layer) or (0, 0)
        sides: tuple[tuple[Side, int], ...] = (("channels", 0), ("outputs", outputs), ("inputs", inputs))
        for side, dim in sides:
            here = parts.get((name.rpartition(".")[0], side), [])
            if name.endswith("weight") and here and _covers(here, weights[name].shape[dim]):
                divided.setdefault(name, []).append(_Axis(dim, here))
    every = [axis for several in divided.values() for axis in several]
    # A layer may read several groups side by side (a concatenation). Its weight has one index along that dimension, so
    # these groups become one key, their units numbered one group after the other.
    key = list(range(len(groups)))
    for axis in every:
        joined = {key[part.group] for part in axis.parts}
        key = [min(joined) if each in joined else each for each in key]
    first: dict[int, int] = {}  # group -> the number of its first unit within its key
    total: dict[int, int] = {}  # key -> units so far
    for number in sorted({part.group for axis in every for part in axis.parts}):
        first[number] = total.get(key[number], 0)
        total[key[number]] = first[number] + len(groups[number])
    members: dict[str, list[Member]] = {}
    for name, several in divided.items():
        for dim, here in several:
            unit_of = torch.empty(weights[name].shape[dim], dtype=torch.long)
            for number, slot in here:
                for unit, indices in enumerate(slot.indices):
                    unit_of[list(indices)] = first[number] + unit
            shape = [1] * weights[name].dim()
            shape[dim] = -1
            members.setdefault(name, []).append((groups[key[here[0].group]].name, unit_of.view(shape)))
    return members


def _covers(parts: Sequence[_Part], size: int) -> bool:
    """Whether these slots hold every index of a side once."""
    return sorted(index for _, slot in parts for unit in slot.indices for index in unit) == list(range(size))
