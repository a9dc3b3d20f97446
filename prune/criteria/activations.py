"""Wanda: weights times the norms of the activations that they are multiplied with."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from prune.criteria.weights import check, precise
from workbench.messages import some
from workbench.models.forward import all_reduce_sum, batches, forward, preserve_state, total_batches
from workbench.models.matrices import matrices
from workbench.models.positions import tokens_of


def wanda(model: nn.Module, weights: Mapping[str, nn.Parameter], loader: Iterable[Any]) -> dict[str, Tensor]:
    """The magnitude of a weight times the norm of its input.

    Formula: ``|W_ij| * ||X_j||_2``, the norm of input j over all positions of all batches.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, arXiv:2306.11695,
    equation 1.

    When to use: on trained transformers, without fine-tuning afterwards, with structure ``balanced`` as in the paper:
    it compares the inputs of one output, because norms of different layers have different scales.

    The model is run in eval mode. Linear and transformers' Conv1D: X_j is an input feature. If a batch has an
    ``attention_mask``, [B, L], padding does not count in inputs [B, L, ...] or [B * L, ...]. Convolutions: X_j are the
    values that the weight is multiplied with, one for every position of the kernel, padding included (the unfolded
    input); so it differs between the weights of one filter. A weight shared by several layers counts the inputs of all.
    W is what the layer multiplies by, also under ``weight_norm`` or ``spectral_norm``.

    Args:
        model: run as ``model(**batch)`` without labels, ``model(batch[0])`` or ``model(batch)``, without a graph.
        weights: parameters of its Linear and Conv layers by name; frozen ones too.
        loader: batches, read once and not kept.

    Returns:
        Scores by name, 0 or more, in fp32 or float64.

    Raises:
        ValueError: if the loader is empty, a weight is sharded, tied by memory alone or of another layer, or its layer
            was never called.
    """
    check(model, weights)
    check_inputs(model, weights)
    every = matrices(model)
    names = {id(weight): name for name, weight in weights.items()}
    uses = {id(m.layer): m for m in every.values() if id(m.parameter) in names}  # a layer under two names is one
    layers = [(names[id(matrix.parameter)], matrix.layer) for matrix in uses.values()]
    index = {name: position for position, name in enumerate(weights)}
    device, count, tokens = next(iter(weights.values())).device, 0, None

    def add_squares(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = precise(args[0] if args else next(iter(kwargs.values()))).square()
        squares[name] += _unfolded(layer, inputs) if isinstance(layer, _ConvNd) else _flat(layer, inputs, tokens)
        calls[index[name]] += 1

    with preserve_state(model, training=False), torch.no_grad(), ExitStack() as hooks:
        squares, calls = _zeros(weights, layers), torch.zeros(len(weights), dtype=torch.int64, device=device)
        for name, layer in layers:
            hook = layer.register_forward_pre_hook(partial(add_squares, name), with_kwargs=True)
            hooks.callback(hook.remove)
        for batch in batches(loader, device):
            tokens = tokens_of(batch)
            forward(model, batch)
            count += 1
    total_batches(count, device)
    all_reduce_sum([calls, *squares.values()])
    missed = [name for name, position in index.items() if not calls[position]]
    if missed:
        raise ValueError(
            f"the layers of {some(missed)} were never called, so their inputs are not known: exclude them, or give "
            "batches that reach them (nn.MultiheadAttention reads the weight of its out_proj without calling it)"
        )
    products = {name: precise(every[name].product()) for name in weights}
    return {name: product.abs() * squares[name].sqrt().to(product) for name, product in products.items()}


def check_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Refuse weights of layers that do not take their inputs as they are called.

    Raises:
        ValueError: naming them.
    """
    every = matrices(model)
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ValueError(f"{some(unknown)} are not the weight of any layer: Wanda scores Linear and Conv layers")
    if others := {n: every[n] for n in names if every[n].kind not in ("linear", "convolution")}:
        kind = type(next(iter(others.values())).layer).__name__
        raise ValueError(
            f"{some(others)}: Wanda scores Linear and Conv layers, whose inputs they are called with, and this is a "
            f"{kind}: exclude it, or use another criterion"
        )


def _zeros(weights: Mapping[str, nn.Parameter], layers: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Name -> zeros, one for each input that the weight is multiplied with, that broadcast to its shape."""
    zeros: dict[str, Tensor] = {}
    for name, layer in layers:
        weight = weights[name]
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        if isinstance(layer, _ConvNd):
            shape = tuple(weight.shape)
        else:
            shape = (1, weight.shape[1]) if isinstance(layer, nn.Linear) else (weight.shape[0], 1)
        if name in zeros and zeros[name].shape != shape:
            raise ValueError(f"'{name}' is shared by layers that use it in different ways: exclude it")
        zeros[name] = torch.zeros(shape, dtype=dtype, device=weight.device)
    return zeros


def _flat(layer: nn.Module, squares: Tensor, tokens: Tensor | None) -> Tensor:
    """Sums over all positions but padding, for every input feature: [1, in], of Conv1D [in, 1]."""
    if tokens is not None and squares.ndim > 2 and squares.shape[:2] == tokens.shape:
        squares = squares[tokens]
    elif tokens is not None and squares.ndim == 2 and len(squares) == tokens.numel():
        squares = squares[tokens.flatten()]
    sums = squares.reshape(-1, squares.shape[-1]).sum(0)
    return sums[None] if isinstance(layer, nn.Linear) else sums[:, None]


def _unfolded(layer: _ConvNd, squares: Tensor) -> Tensor:
    """Sums over all positions of the kernel, of the weight's shape."""
    dims, groups, padding = len(layer.kernel_size), layer.groups, layer.padding
    squares = squares[None] if squares.ndim == dims + 1 else squares
    if layer.transposed:
        shape = (layer.in_channels, 1, *layer.kernel_size)
    else:
        shape = (groups, layer.in_channels // groups, *layer.kernel_size)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        squares, padding = F.pad(squares, layer._reversed_padding_repeated_twice, mode), [0] * dims
    settings = (layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, groups)
    # The derivative of the summed output by a weight is the sum of the inputs that it is multiplied with. One filter a
    # group is enough, because all filters of a group read the same inputs.
    with torch.enable_grad():
        kernel = squares.new_zeros(shape).requires_grad_()
        output = torch.convolution(squares, kernel, None, *settings)  # pyright: ignore[reportArgumentType]
        (sums,) = torch.autograd.grad(output.sum(), kernel)
    return sums if layer.transposed else sums.repeat_interleave(layer.out_channels // groups, 0)
