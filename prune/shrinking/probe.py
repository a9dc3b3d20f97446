"""Units that nothing reads, and units that never change."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune.shrinking.calls import Call
from prune.shrinking.surgery import columns, places_of
from prune.shrinking.units import Slot, Units
from workbench.resize import axes, is_conv1d

_SAME = 1e-12


def unread(model: nn.Module, units: Units) -> Tensor:
    """Which units have only zeros in every column that reads them; bool, [units]."""
    zero = torch.ones(len(units), dtype=torch.bool)
    for slot in units.read:
        zero &= _all(columns(model, slot).flatten(1).count_nonzero(1) == 0, slot)
    return zero


def constants(model: nn.Module, groups: Sequence[Units], calls: Sequence[Call]) -> list[Tensor]:
    """Which units have the same value everywhere, whatever the input, that every layer reading them can take over.

    Candidates are those of which some layer's rows are all zero. Their values are looked at where they are read, over
    all ``calls``; and again with every row that is not zero replaced by a random one, twice, with biases of either
    sign: what is still the same everywhere does not depend on what comes before those zeros. A convolution that pads
    with zeros can only take over the value 0.

    Returns:
        bool, [units], for each of ``groups``.
    """
    candidates = [_emptied(model, units) for units in groups]
    asked = [(units, found) for units, found in zip(groups, candidates) if bool(found.any())]
    layers = list(dict.fromkeys(slot.layer for units, _ in asked for slot in units.read))
    for sign in (0, 1, -1) if asked else ():
        values = read_values(scrambled(model, asked, sign, living=True) if sign else model, layers, calls)
        same = {layer: _is_same(*found) for layer, found in values.items()}
        if not sign:
            zero = {layer: (low == 0) & (high == 0) for layer, (low, high) in values.items()}
            same |= {layer: zero[layer] for layer in same if not _takes_any(model.get_submodule(layer))}
        for units, found in asked:
            for slot in units.read:
                found &= _all(same[slot.layer], slot) if slot.layer in same else torch.zeros_like(found)
    return candidates


@torch.no_grad()
def read_values(model: nn.Module, layers: Sequence[str], calls: Sequence[Call]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> the least and the greatest value that it is given for each of its inputs; layers not called left out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def looking(name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            value = given[0]
            if isinstance(module, nn.Linear) or is_conv1d(module):
                axis = -1
            else:
                axis = value.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
            flat = value.movedim(axis, 0).flatten(1)
            low, high = flat.amin(1), flat.amax(1)
            if name in found:
                low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
            found[name] = low, high

        return look

    hooks = [model.get_submodule(name).register_forward_pre_hook(looking(name)) for name in layers]
    try:
        for call in calls:
            call.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def scrambled(
    model: nn.Module, chosen: Sequence[tuple[Units, Tensor]], sign: int = 1, living: bool = False
) -> nn.Module:
    """A copy in which chosen units are made of random weights.

    Args:
        model: is not changed.
        chosen: units, and which of them, bool, [units].
        sign: of the biases.
        living: leave rows that are zero as they are, with their biases.
    """
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    for units, which in chosen:
        for slot in units.made:
            module = other.get_submodule(slot.layer)
            mine = which & ~_all(_empty_rows(module), slot) if living else which
            rows, weight, bias = places_of(slot, mine), _rows(module), getattr(module, "bias", None)
            if weight is not None:
                noise = torch.randn(len(rows), *weight.shape[1:], generator=random, dtype=torch.float64)
                weight[rows] = (noise / max(1, weight[0].numel()) ** 0.5).to(weight)
            if isinstance(bias, Tensor):
                bias[rows] = (sign * (1 + torch.rand(len(rows), generator=random, dtype=torch.float64))).to(bias)
    return other


def _emptied(model: nn.Module, units: Units) -> Tensor:
    """Which units have only zeros in their rows in some layer that makes them."""
    empty = torch.zeros(len(units), dtype=torch.bool)
    for slot in units.made:
        empty |= _all(_empty_rows(model.get_submodule(slot.layer)), slot)
    return empty


def _empty_rows(module: nn.Module) -> Tensor:
    weight = _rows(module)
    if weight is None:  # a norm without weights
        return torch.zeros(int(module.num_features), dtype=torch.bool)  # type: ignore[arg-type]
    return weight.flatten(1).count_nonzero(1).cpu() == 0


def _rows(module: nn.Module) -> Tensor | None:
    """The weight of a layer, a view with its outputs first; None if it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    rows = weight.detach().movedim((axes(module) or (0,))[0], 0)
    return rows if rows.dim() > 1 else rows[:, None]


def _is_same(low: Tensor, high: Tensor) -> Tensor:
    return high - low <= _SAME * torch.maximum(low.abs(), high.abs()).clamp(min=1)


def _all(flags: Tensor, slot: Slot) -> Tensor:
    """Which units have all their places flagged; bool, [units]."""
    known: list[bool] = flags.cpu().tolist()
    return torch.tensor([all(known[place] for place in places) for places in slot.places])


def _takes_any(module: Any) -> bool:
    """Whether a constant input can be put into the layer's bias: whether no border sees less of it."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    if getattr(module, "transposed", False):
        return False
    padded = (
        any(size > 1 for size in module.kernel_size)
        if module.padding == "same"
        else module.padding != "valid" and any(module.padding)
    )
    return not padded or module.padding_mode != "zeros"


def folded(model: nn.Module, slot: Slot, which: Tensor, values: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor | None:
    """What the layer adds up from constant units, to be added to its bias; None if that is nothing."""
    places = places_of(slot, which)
    low, high = (bound[places] for bound in values[slot.layer])
    reading = columns(model, slot)[places]
    reading = reading.sum(tuple(range(2, reading.dim()))) if reading.dim() > 2 else reading
    return extra if bool((extra := (low + high) / 2 @ reading).any()) else None


@torch.no_grad()
def zero_columns(model: nn.Module, slot: Slot, which: Tensor) -> None:
    """Let the layer read nothing of these units."""
    columns(model, slot)[places_of(slot, which)] = 0
