"""Units taken out of the layers that make and read them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prune.shrinking.units import Slot, Units
from workbench.models.resize import axes, settle

Chosen = Sequence[tuple[Units, Tensor]]


@torch.no_grad()
def cut(model: nn.Module, chosen: Chosen, masks: dict[str, Tensor]) -> None:
    """Take units out of ``model`` and of ``masks``, in place.

    Args:
        model: the network.
        chosen: units and which of them go, bool, [units].
        masks: parameter name -> its mask.
    """
    gone: dict[tuple[str, str], set[int]] = {}
    for units, which in chosen:
        for slot in units.slots:
            gone.setdefault((slot.layer, slot.side), set()).update(places_of(slot, which))
        for (holder, name), amount in units.counts.items():
            module = model.get_submodule(holder)
            setattr(module, name, getattr(module, name) - amount * int(which.sum()))
    for (layer, side), places in gone.items():
        module = model.get_submodule(layer)
        for name, tensor in _tensors(module).items():
            dim = _dim(module, name, side)
            if dim is None or not tensor.dim():
                continue
            path = f"{layer}.{name}" if layer else name
            kept = torch.tensor([i for i in range(tensor.shape[dim]) if i not in places], device=tensor.device)
            if path in masks:
                masks[path] = masks[path].index_select(dim, kept.to(masks[path].device))
            less = tensor.detach().index_select(dim, kept)
            setattr(
                module, name, nn.Parameter(less, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else less
            )
        settle(module)


def going(chosen: Chosen) -> Chosen:
    """The same but for the first unit where all are chosen: one always stays."""
    return [(units, which & (torch.arange(len(which)) > 0) if bool(which.all()) else which) for units, which in chosen]


@torch.no_grad()
def empty(model: nn.Module, chosen: Chosen) -> None:
    """Make the units of zeros, in place, so that those that stay need nothing from before them."""
    for units, which in chosen:
        for slot in units.made:
            if slot.side == "outputs":
                rows(model, slot)[places_of(slot, which)] = 0


def is_empty(model: nn.Module, units: Units) -> bool:
    """Whether all weights that make or read these units are zero."""
    every = torch.ones(len(units), dtype=torch.bool)
    views = [(rows(model, slot), slot) for slot in units.made if slot.side == "outputs"]
    views += [(columns(model, slot), slot) for slot in units.read]
    return not any(bool(view[places_of(slot, every)].any()) for view, slot in views)


def rows(model: nn.Module, slot: Slot) -> Tensor:
    """The weight of a layer, a view with its outputs first."""
    return _turned(model, slot, 0)


def columns(model: nn.Module, slot: Slot) -> Tensor:
    """The weight of a layer, a view with its inputs first."""
    return _turned(model, slot, 1)


def _turned(model: nn.Module, slot: Slot, side: int) -> Tensor:
    module = model.get_submodule(slot.layer)
    weight, where = module.weight, axes(module)
    assert isinstance(weight, Tensor)
    assert where is not None
    return weight.detach().movedim(where[side], 0)


def places_of(slot: Slot, which: Tensor) -> list[int]:
    """Where the chosen units are in a layer."""
    return [place for unit in which.nonzero().flatten().tolist() for place in slot.places[unit]]


def removed_rows(chosen: Chosen) -> Mapping[str, list[int]]:
    """Layer -> which of its outputs go."""
    return {
        slot.layer: places_of(slot, which) for units, which in chosen for slot in units.made if slot.side == "outputs"
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _dim(module: nn.Module, name: str, side: str) -> int | None:
    """The dimension of a layer's tensor that a side lies along; None if it has none of it."""
    if name == "weight":
        where = axes(module) or (0, 0)
        return where[1] if side == "inputs" else where[0]
    return None if side == "inputs" else 0
