"""The structure whose units can be taken out of a network whole."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune.shrinking.equivalence import Call, alike, answers, rounding
from prune.shrinking.find import find_units
from prune.shrinking.surgery import cut, going
from prune.shrinking.units import Slot, Units
from prune.shrinking.unused import scrambled, zero_columns
from prune.structures.axes import layer_of
from prune.structures.layout import Layout, Member, Tensors
from workbench.models.resize import axes


@dataclass(frozen=True, eq=False)
class Coupled:
    """Channels tied by the network: all rows that make one and all columns that read it are one unit.

    What `prune.shrink` can remove exactly: hidden units, channels of convolutions, those of a residual stream together
    in all its layers, groups of a GroupNorm, feed-forward units and heads of transformers. Inputs and outputs of the
    network are no units, nor is what a LayerNorm mixes; weights that lie in no unit are not covered.

    Attributes:
        example_inputs: what the model is called with, to trace it: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. For recipes: a list of whole numbers, the shape of a batch of numbers, such as
            [2, 3, 32, 32]; and lists for tensors in a mapping, such as {input_ids: [[1, 2, 3]]}.

    Reference: Fang et al., DepGraph: Towards any structural pruning, 2023, arXiv:2301.12900, section 3.
    """

    example_inputs: Any

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each channel that can go, of the key that is the first layer that makes it.

        Raises:
            ValueError: if the model cannot be called or traced with the example inputs, or no weight is in a unit.
        """
        probe = copy.deepcopy(model).eval()
        for parameter in probe.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        given = Call.of(_written(self.example_inputs)).beside(model)
        answers(probe, [given])  # says what is wrong with the inputs
        groups = _independent(probe, find_units(probe, given), [given, given.drawn()])
        members = _members(model, weights, groups)
        if not members:
            raise ValueError(
                f"no channel of {type(model).__name__} among these weights can go without changing what goes in, comes "
                "out or is normalised with it: choose another structure, or loosen include and exclude"
            )
        return Layout({name: weights[name].shape for name in members}, members)


def _written(inputs: Any) -> Any:
    """Inputs as a recipe writes them, as tensors."""
    if isinstance(inputs, Mapping):
        return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)) and inputs and all(type(size) is int for size in inputs):
        return torch.randn(*inputs, generator=torch.Generator().manual_seed(0))
    return inputs


def _independent(model: nn.Module, groups: list[Units], calls: Sequence[Call]) -> list[Units]:
    """Those groups of which every other unit can go when no layer reads it."""

    def fine(some: Sequence[Units]) -> bool:
        chosen = [(units, torch.arange(len(units)) % 2 == 0) for units in some]
        deaf = copy.deepcopy(model)
        for units, which in chosen:
            for slot in units.read:
                zero_columns(deaf, slot, which)
        expected = answers(deaf, calls)
        allowed = rounding(
            expected, max(torch.finfo(value.dtype).eps for value in expected if value.is_floating_point())
        )
        try:
            other = answers(scrambled(deaf, chosen), calls)
            cut(deaf, going(chosen), {})
            return alike(expected, other, allowed) and alike(expected, answers(deaf, calls), allowed)
        except ValueError:  # whatever a forward pass says to shapes that it does not expect
            return False

    return groups if fine(groups) else [units for units in groups if fine([units])]


def _members(model: nn.Module, weights: Tensors, groups: Sequence[Units]) -> dict[str, list[Member]]:
    """Parameter name -> the keys and units that its weights belong to."""
    shares: dict[tuple[str, str], list[tuple[int, Slot]]] = {}
    for number, units in enumerate(groups):
        for slot in units.slots:
            shares.setdefault((slot.layer, slot.side), []).append((number, slot))
    sides: dict[str, list[tuple[int, list[tuple[int, Slot]]]]] = {}
    for name in weights:
        layer = layer_of(model, name)
        where = axes(layer) or (0, 0)
        for side, dim in (("channels", 0), ("outputs", where[0]), ("inputs", where[1])):
            found = shares.get((name.rpartition(".")[0], side), [])
            if name.endswith("weight") and found and _cover(found, weights[name].shape[dim]):
                sides.setdefault(name, []).append((dim, found))
    # Layers that one layer reads side by side are one key.
    home = list(range(len(groups)))
    for found in (found for several in sides.values() for _, found in several):
        together = {home[number] for number, _ in found}
        home = [min(together) if at in together else at for at in home]
    first: dict[int, int] = {}
    total: dict[int, int] = {}
    for number in sorted({number for several in sides.values() for _, found in several for number, _ in found}):
        first[number] = total.get(home[number], 0)
        total[home[number]] = first[number] + len(groups[number])
    members: dict[str, list[Member]] = {}
    for name, several in sides.items():
        for dim, found in several:
            index = torch.empty(weights[name].shape[dim], dtype=torch.long)
            for number, slot in found:
                for unit, places in enumerate(slot.places):
                    index[list(places)] = first[number] + unit
            shape = [1] * weights[name].dim()
            shape[dim] = -1
            members.setdefault(name, []).append((groups[home[found[0][0]]].name, index.view(shape)))
    return members


def _cover(found: Sequence[tuple[int, Slot]], size: int) -> bool:
    """Whether these slots hold every place of a side once."""
    places = sorted(place for _, slot in found for unit in slot.places for place in unit)
    return places == list(range(size))
