"""New initial weights for a network, as its constructor would draw them."""

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.architecture import build, describe
from workbench.models.copying import copied
from workbench.models.resize import axes
from workbench.randomness import same_random_state

_RESETS = ("reset_parameters", "_reset_parameters")
_RULE = "_init_weights"


def reinitialised(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict of new initial weights and fresh buffers for ``network``, which stays as it is.

    What says how it was built (``init_args``, hyperparameters, a configuration of transformers) is built again: the
    weights are then those of a fresh construction under ``seed``. Of everything else, and where a constructor gives
    layers the same weights whatever the seed because it loads them, each part is built again or has its
    ``reset_parameters`` or ``_init_weights`` called, inner modules before outer ones. Layers that were shrunk get the
    corner of the weights that they had as built, scaled to as many inputs as are left; those of transformers, whose
    scale does not depend on the inputs, unscaled.

    Frozen parameters keep their values, as do buffers beside nothing but frozen ones: no training starts from them,
    they are part of what is computed, such as embeddings taken from a teacher. Buffers that nothing resets are taken
    for constants.

    Args:
        network: On any device; tied weights stay tied.
        seed: Of the draws. Torch's, numpy's and python's own random state is left alone.

    Returns:
        Names and types as in ``network.state_dict()``, on the CPU.

    Raises:
        ValueError: Naming the parameters that nothing draws anew.

    Source: Frankle & Carbin 2019, arXiv:1803.03635, section 2 (the control of a winning ticket).
    """
    drawn = copied(network).cpu()
    with torch.no_grad(), torch.device("cpu"), same_random_state(seed):
        trained = {name: each for name, each in drawn.named_parameters() if each.requires_grad}
        for parameter in drawn.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)
        _redraw(drawn)
    if left := [name for name, parameter in trained.items() if bool(parameter.isnan().any())]:
        raise ValueError(
            f"no new initial weights can be drawn for {', '.join(left[:3])}{' and more' if left[3:] else ''} of "
            f"{type(network).__name__}: let it keep what it was built with, as JSON, in self.init_args, or give the "
            "module that has them a method reset_parameters()"
        )
    kept, before = set(_kept(network)), network.state_dict()
    return {
        name: before[name].detach().cpu().clone() if name in kept else value.detach()
        for name, value in drawn.state_dict().items()
    }


def _redraw(module: nn.Module) -> None:
    """Give every parameter of ``module`` that something can draw a new value, in place."""
    if not module.state_dict():
        return
    if (built := _rebuilt(module)) is not None:
        module.load_state_dict(built)
        return
    for child in module.children():
        _redraw(child)
    for name in _RESETS:
        if callable(reset := getattr(module, name, None)):
            reset()
    rule = getattr(module, _RULE, None)
    if callable(rule) and len(inspect.signature(rule).parameters) == 1:
        module.apply(rule)  # type: ignore[arg-type] - whatever it returns


def _rebuilt(module: nn.Module) -> dict[str, Tensor] | None:
    """The state of ``module`` as it is built; None if nobody knows how, or if it comes out the same every time."""
    described = describe(module)
    if described is None:
        return None
    whole = {name: value for name, value in described.items() if name != "resized"}
    try:
        one, other = (build(whole, Path(described["class_path"])).state_dict() for _ in range(2))
    except ValueError:
        return None
    if "resized" in described:
        one, other = _shrunk(one, module), _shrunk(other, module)
    if _shapes(one) != _shapes(module.state_dict()):
        return None
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    return None if any(_same(one[name], other[name]) for name in _layers(module).keys() & trained) else one


def _shrunk(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """What is left of a state as built in the sizes that ``module`` has."""
    ruled = tuple(f"{path}." if path else "" for path, each in module.named_modules() if hasattr(each, _RULE))
    inputs = _layers(module)
    found: dict[str, Tensor] = {}
    for name, shape in _shapes(module.state_dict()).items():
        built = state.get(name, torch.zeros(shape))
        left = found[name] = built[tuple(slice(size) for size in shape)] if built.dim() == len(shape) else built
        if name in inputs and not name.startswith(ruled):
            dim = inputs[name]
            left.mul_(math.sqrt(built.shape[dim] / left.shape[dim]))
    return found


def _layers(module: nn.Module) -> dict[str, int]:
    """Name of the weight of a linear or convolutional layer -> the dimension that its inputs lie along."""
    found = {path: axes(each) for path, each in module.named_modules()}
    return {f"{path}.weight" if path else "weight": dims[1] for path, dims in found.items() if dims is not None}


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two constructions gave the same weights, and not a constant."""
    return torch.equal(one, other) and bool((one != one.flatten()[0]).any())


def _kept(network: nn.Module) -> Iterator[str]:
    """Names of frozen parameters, and of buffers beside nothing but them."""
    for path, module in network.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(recurse=False))
        yield from (prefix + name for name, parameter in own.items() if not parameter.requires_grad)
        if own and not any(parameter.requires_grad for parameter in own.values()):
            yield from (prefix + name for name, _ in module.named_buffers(recurse=False))
