"""Which axis of a layer's weight is its outputs, and which its inputs."""

import torch
from torch import Tensor, nn

from workbench.models.wrappers import submodule


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer whose weight has this name."""
    return submodule(model, name.rpartition(".")[0])


def turned(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor laid out like the layer's weight, as [outputs, inputs, *kernel], or back: it is its own inverse.

    Linear and Conv layers have that order already; transformers' ``Conv1D`` has the opposite one, and transposed
    convolutions have it within each group. The inputs are those of one group.
    """
    if type(layer).__name__ == "Conv1D":
        return tensor.T
    if not getattr(layer, "transposed", False):
        return tensor
    return tensor.unflatten(0, (groups_of(layer), -1)).transpose(1, 2).flatten(0, 1)


def shape_of(layer: nn.Module, weight: Tensor) -> torch.Size:
    """(outputs, inputs of a group, *kernel) of a tensor laid out as the layer's weight."""
    return turned(layer, torch.empty(weight.shape, device="meta")).shape


def groups_of(layer: nn.Module) -> int:
    """Number of groups of a transposed convolution; 1 of other layers, whose outputs lie along one axis anyway."""
    groups = getattr(layer, "groups", 1) if getattr(layer, "transposed", False) else 1
    assert isinstance(groups, int)
    return groups
