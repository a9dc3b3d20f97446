"""Units that nothing reads, and units that never change."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune.shrinking.architecture import config_around
from prune.shrinking.equivalence import Call
from prune.shrinking.producers import Makers, makers_of
from prune.shrinking.surgery import columns, places_of
from prune.shrinking.units import Slot, Units
from workbench.models.resize import axes, is_conv1d

_SAME = 1e-12


def unread(model: nn.Module, units: Units) -> Tensor:
    """Which units have only zeros in every column that reads them; bool, [units]."""
    zero = torch.ones(len(units), dtype=torch.bool)
    for slot in units.read:
        zero &= _all(columns(model, slot).flatten(1).count_nonzero(1) == 0, slot)
    return zero


def constants(model: nn.Module, groups: Sequence[Units], calls: Sequence[Call], folding: bool = True) -> list[Tensor]:
    """Which units have the same value everywhere, whatever the input, that every layer reading them can take over.

    Candidates are those of which some layer's rows are all zero, and of which nothing but layers of their own makes
    what is read (`flow.makers_of`). Their values are looked at where they are read, over all ``calls``; and again with
    every row that is not zero replaced by a random one, twice, of opposite signs but for norms: what is still the same
    does not depend on what comes before those zeros. A convolution that pads with zeros can only take over the value
    0, and so can a layer without a bias in a model of transformers, whose ``from_pretrained`` would lose a new one.
    Without ``folding`` every layer only takes over the value 0.

    Returns:
        bool, [units], for each of ``groups``.
    """
    candidates = [_emptied(model, units) for units in groups]
    asked = [(units, found) for units, found in zip(groups, candidates) if bool(found.any())]
    layers = list(dict.fromkeys(slot.layer for units, _ in asked for slot in units.read))
    _keep_own(model, asked, groups, makers_of(model, layers, calls[0]) if asked else {})
    asked = [(units, found) for units, found in asked if bool(found.any())]
    if not asked:
        return candidates
    living = [(units, torch.ones_like(found)) for units, found in zip(groups, candidates)]
    values, one, other = (
        read_values(scrambled(model, living, sign, living=True) if sign else model, layers, calls)
        for sign in (0, 1, -1)
    )
    same = {}
    for layer, (low, high) in values.items():
        spread = torch.minimum(one[layer][0], other[layer][0]), torch.maximum(one[layer][1], other[layer][1])
        own = _is_same(low, high) if folding and _takes_any(model, layer) else (low == 0) & (high == 0)
        same[layer] = own & _is_same(*spread)
    for units, found in asked:
        for slot in units.read:
            found &= _all(same[slot.layer], slot) if slot.layer in same else torch.zeros_like(found)
    return candidates


def _keep_own(
    model: nn.Module, asked: Sequence[tuple[Units, Tensor]], groups: Sequence[Units], makers: Mapping[str, Makers]
) -> None:
    """Leave only candidates that are read as a function of layers that make units, in place.

    What a depthwise convolution that pads with zeros makes of a constant depends on the border, unless it is of zeros.
    """
    readers: dict[str, set[str]] = {}
    for units in groups:
        for slot in units.read:
            readers.setdefault(slot.layer, set()).update(made.layer for made in units.made)
    for units, found in asked:
        makes = {slot.layer: slot for slot in units.made}
        for slot in units.read:
            known = makers.get(slot.layer)
            if known is None or not known <= readers[slot.layer]:
                found.zero_()
                break
            for layer in known & makes.keys():
                module = model.get_submodule(layer)
                if makes[layer].side == "channels" and _pads(module):
                    found &= _all(_empty_rows(module), makes[layer])


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
    model: nn.Module, chosen: Sequence[tuple[Units, Tensor]], sign: float = 1, living: bool = False
) -> nn.Module:
    """A copy in which chosen units are made of random weights.

    Args:
        model: is not changed.
        chosen: units, and which of them, bool, [units].
        sign: of the biases, which the weights of those that mix channels are multiplied by, too.
        living: leave rows that are zero as they are, with their biases.
    """
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    for units, which in chosen:
        for slot in units.made:
            module = other.get_submodule(slot.layer)
            mine = which & ~_all(_empty_rows(module), slot) if living else which
            rows, weight, bias = places_of(slot, mine), _rows(module), getattr(module, "bias", None)
            turn = sign if slot.side == "outputs" else 1
            if weight is not None:
                noise = torch.randn(len(rows), *weight.shape[1:], generator=random, dtype=torch.float64)
                weight[rows] = (turn * noise / max(1, weight[0].numel()) ** 0.5).to(weight)
            if isinstance(bias, Tensor):
                bias[rows] = (turn * (1 + torch.rand(len(rows), generator=random, dtype=torch.float64))).to(bias)
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


def _takes_any(model: nn.Module, layer: str) -> bool:
    """Whether a constant input can be put into the layer's bias."""
    module: Any = model.get_submodule(layer)
    if module.bias is None and config_around(model, layer) is not None:
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module) or not (module.transposed or _pads(module))


def _pads(module: Any) -> bool:
    """Whether a convolution pads with zeros, so that the border sees less of a constant."""
    if module.padding == "same":
        padded = any(size > 1 for size in module.kernel_size)
    else:
        padded = module.padding != "valid" and any(module.padding)
    return padded and module.padding_mode == "zeros"


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
