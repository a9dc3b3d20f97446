"""Removing units from the layers that produce and consume them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prune.shrinking.units import Group, Selection, Side, Slot
from workbench.models.resize import axes, sync_sizes


@torch.no_grad()
def remove(model: nn.Module, selections: Sequence[Selection], masks: dict[str, Tensor]) -> None:
    """Remove units from ``model`` and from ``masks``, in place.

    Args:
        model: the network.
        selections: the units.
        masks: parameter name -> its mask.
    """
    # All indices of a side are removed at once: after a first removal the others would be numbered anew.
    removed: dict[tuple[str, Side], set[int]] = {}
    for group, mask in selections:
        for slot in group.slots:
            removed.setdefault((slot.layer, slot.side), set()).update(slot.select(mask))
        for attribute, amount in group.counts.items():
            module = model.get_submodule(attribute.module)
            setattr(module, attribute.name, getattr(module, attribute.name) - amount * int(mask.sum()))
    for (layer, side), indices in removed.items():
        module = model.get_submodule(layer)
        for name, tensor in _tensors(module).items():
            dim = _dim(module, name, side)
            if dim is None or not tensor.dim():
                continue
            path = f"{layer}.{name}" if layer else name
            kept = torch.tensor([i for i in range(tensor.shape[dim]) if i not in indices], device=tensor.device)
            if path in masks:
                masks[path] = masks[path].index_select(dim, kept.to(masks[path].device))
            smaller = tensor.detach().index_select(dim, kept)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller)
        sync_sizes(module)


def keep_one(selections: Sequence[Selection]) -> list[Selection]:
    """The same without the first unit of a group that is selected whole: a layer of width 0 cannot be called."""
    return [
        Selection(group, mask & (torch.arange(len(mask)) > 0) if bool(mask.all()) else mask)
        for group, mask in selections
    ]


@torch.no_grad()
def zero_rows(model: nn.Module, selections: Sequence[Selection]) -> None:
    """Set the rows that produce these units to zero, so that a unit that stays needs no input."""
    for group, mask in selections:
        for slot in group.producers:
            if slot.side == "outputs":
                rows(model, slot)[slot.select(mask)] = 0


@torch.no_grad()
def zero_columns(model: nn.Module, slot: Slot, mask: Tensor) -> None:
    """Set the columns that consume these units to zero."""
    columns(model, slot)[slot.select(mask)] = 0


def is_zero(model: nn.Module, group: Group) -> bool:
    """Whether all weights that produce or consume the units of a group are zero."""
    everything = torch.ones(len(group), dtype=torch.bool)
    views = [(rows(model, slot), slot) for slot in group.producers if slot.side == "outputs"]
    views += [(columns(model, slot), slot) for slot in group.consumers]
    return not any(bool(view[slot.select(everything)].any()) for view, slot in views)


def rows(model: nn.Module, slot: Slot) -> Tensor:
    """The weight of the slot's layer, a view with its outputs first."""
    return _view(model, slot, 0)


def columns(model: nn.Module, slot: Slot) -> Tensor:
    """The weight of the slot's layer, a view with its inputs first."""
    return _view(model, slot, 1)


def _view(model: nn.Module, slot: Slot, axis: int) -> Tensor:
    module = model.get_submodule(slot.layer)
    weight, dims = module.weight, axes(module)
    assert isinstance(weight, Tensor)
    assert dims is not None
    return weight.detach().movedim(dims[axis], 0)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _dim(module: nn.Module, name: str, side: Side) -> int | None:
    """The dimension of a layer's tensor that a side is along; None if it has none, as a bias has no inputs."""
    if name == "weight":
        outputs, inputs = axes(module) or (0, 0)
        return inputs if side == "inputs" else outputs
    return None if side == "inputs" else 0
