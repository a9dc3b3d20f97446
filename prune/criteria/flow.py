"""SynFlow: the flow through a weight from an input of ones to the sum of the outputs."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prune.criteria.weights import check
from workbench.messages import some
from workbench.models.forward import inputs_of, preserve_state, to_device
from workbench.models.matrices import matrices


def synflow(model: nn.Module, weights: Mapping[str, nn.Parameter], loader: Iterable[Any]) -> dict[str, Tensor]:
    """Synaptic flow: how much of the flow from the inputs to the outputs passes through the weight.

    Formula: ``|w| * dR/d|w|``, where R is the sum of the outputs for an input of ones, with all parameters positive.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    arXiv:2006.05467, Algorithm 1.

    When to use: before training, without data, at very high sparsity. Not with LayerNorm, which subtracts the mean and
    cancels an input of ones.

    The scores of consecutive layers that are linear, or whose activation is homogeneous of degree 1 (ReLU), sum to the
    same R. So no layer is pruned away if weights are scored anew in many small steps: the paper's 100 rounds.
    Activations stay as they are, batch norms use their running statistics (the mean's absolute value, as in the paper's
    code), and everything is computed in float64, because R is a product over layers.

    Args:
        model: takes floating-point inputs; its parameters are neither changed nor differentiated.
        weights: parameters of it by name; frozen ones too.
        loader: batches; only the first is read, and only for the shape of one sample.

    Returns:
        Scores by name, 0 or more, in float64.

    Raises:
        ValueError: if the loader is empty, inputs are integers, a weight is sharded or tied by memory alone, or R is
            zero, infinite or NaN.
    """
    check(model, weights)
    check_products(model, weights)
    device = next(iter(weights.values())).device
    with preserve_state(model, training=False):
        batch = next(iter(loader), None)
        if batch is None:
            raise ValueError("the loader is empty: SynFlow needs one batch, for the shape of the inputs")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        state = {name: _positive(name, value, True, dtype) for name, value in model.named_parameters()}
        state |= {name: _positive(name, value, False, dtype) for name, value in model.named_buffers()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        leaves = {name: state[names[id(weight)]].requires_grad_() for name, weight in weights.items()}
        args, kwargs = inputs_of(batch)
        args, kwargs = to_device((tuple(_ones(value, dtype) for value in args), _ones(kwargs, dtype)), device)
        flow = _first(functional_call(model, state, args, kwargs)).sum()
        if not flow.isfinite() or flow == 0:
            raise ValueError(
                f"the flow through this {type(model).__name__} is {flow.item():g}, so scores have no order: a "
                "layer is pruned away, a norm subtracts all of it, or weights are not finite. Use another criterion"
            )
        gradients = torch.autograd.grad(flow, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else (grad * leaf).abs().detach()
        for (name, leaf), grad in zip(leaves.items(), gradients)
    }


def check_products(model: nn.Module, names: Collection[str]) -> None:
    """Refuse weights that layers do not multiply by as they are: with all of them positive R means nothing.

    Raises:
        ValueError: naming them.
    """
    every = matrices(model)
    if made := {name: matrix.made_by for name in names if (matrix := every[name]).made_by is not None}:
        raise ValueError(
            f"{some(made)} are under {next(iter(made.values()))}, and SynFlow follows weights as they are: remove the "
            "parametrization, exclude them, or use another criterion"
        )


def _positive(name: str, value: Tensor, parameter: bool, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.detach().to(dtype, copy=True)
    return value.abs() if parameter or name.endswith("running_mean") else value


def _ones(inputs: Any, dtype: torch.dtype) -> Any:
    """One sample of ones in the shape of ``inputs``; masks keep their type."""
    if isinstance(inputs, Mapping):
        masks = {name: value for name, value in inputs.items() if name.endswith("mask") and isinstance(value, Tensor)}
        rest = {name: _ones(value, dtype) for name, value in inputs.items() if name not in masks}
        return {**rest, **{name: torch.ones_like(value[:1]) for name, value in masks.items()}}
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"an input is {kind}, but SynFlow sends ones through the network: give floating inputs (embeddings as "
            "inputs_embeds in place of token ids), or use another criterion"
        )
    return torch.ones_like(inputs[:1], dtype=dtype)


def _first(output: Any) -> Tensor:
    """The output itself, or the first tensor in it."""
    values = (
        [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, Mapping) else output)
    )
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is None:
        raise ValueError(f"the model returns {type(output).__name__} without a tensor in it: SynFlow sums its first")
    return first
