"""Cuts multilayer perceptrons: hidden layers and their units."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from distill.student.units import chosen_layers, keep, norms, smaller
from workbench.models import MLP


def cut_mlp(
    teacher: MLP, layers: Sequence[int] | None, every: int | None, hidden: int | Sequence[int] | None
) -> nn.Module:
    """A student with some of the teacher's hidden layers and units, see :func:`distill.cut_student`."""
    own: list[int] = teacher.init_args["hidden"]
    chosen = chosen_layers(len(own), layers, every)
    widths = [own[layer] for layer in chosen]
    if hidden is not None:
        wanted = [hidden] * len(chosen) if isinstance(hidden, int) else list(hidden)
        if len(wanted) != len(chosen):
            raise ValueError(f"hidden={wanted}: the student has {len(chosen)} hidden layers, give as many widths")
        widths = [smaller("hidden", width, most) for width, most in zip(wanted, widths)]
    stages = _stages(teacher.layers)
    parts = [stages[layer] for layer in [*chosen, -1]]
    ins = [teacher.init_args["in_features"], *(own[layer] for layer in chosen)]
    for (linear, *_), size, name in zip(parts, ins, [*(f"layer {layer}" for layer in chosen), "the output"]):
        if linear.in_features != size:
            raise ValueError(
                f"layers={chosen}: {name} reads {linear.in_features} numbers and would be given {size}: "
                "keep the layer before it, or leave out only layers as wide as what they read"
            )
    weight = parts[0][0].weight
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(**{**teacher.init_args, "hidden": widths}).to(weight.device, weight.dtype)
    read = torch.arange(ins[0], device=weight.device)
    with torch.no_grad():
        for index, (old, new) in enumerate(zip(parts, _stages(student.layers))):
            linear, units = old[0], torch.arange(old[0].out_features, device=weight.device)
            if index < len(widths):
                units = keep(norms(linear.weight, linear.bias) * norms(parts[index + 1][0].weight.T), widths[index])
            new[0].weight.copy_(linear.weight[units][:, read])
            new[0].bias.copy_(linear.bias[units])
            for norm, other in zip(new[1:], old[1:]):
                state = {name: tensor[units] if tensor.dim() else tensor for name, tensor in other.state_dict().items()}
                norm.load_state_dict(state)
            read = units
    return student


def _stages(layers: Iterable[nn.Module]) -> list[list[Any]]:
    """The linear layers, each followed by its norm, if it has one."""
    stages: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            stages.append([layer])
        elif list(layer.state_dict()):
            stages[-1].append(layer)
    return stages
