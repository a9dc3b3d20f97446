"""How much gradient reaches the weights that are left."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from workbench.models.forward import all_reduce_sum, batches, preserve_state, scalar, total_batches
from workbench.models.wrappers import named_parameters


def gradient_flow(
    network: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The squared L2 norm of the mean gradient over the batches, on the weights that are kept: ||g * mask||^2.

    To first order it is what a step of gradient descent takes off the loss, per learning rate. Over all parameters that
    train, biases and norms too. The network is in training mode: with the statistics of the batch, and dropout.
    Afterwards its weights, ``.grad``, buffers and modes and the random state are as they were. Called on every rank;
    the batches of all count alike.

    Args:
        network: Differentiable, of any precision.
        loader: Batches, read once and not kept.
        loss: ``loss(network, batch)``, a scalar, the mean over the batch.
        masks: Parameter name -> True where the weight is kept; parameters without one are kept.

    Returns:
        ``total``; ``layers``, parameter name -> its part of it, in definition order; and ``ratio``, that of the first
        Linear or Conv weight to the last, below 1 where gradients vanish on their way back; None if the last has none.

    Raises:
        ValueError: If there is no batch, nothing trains, a parameter is sharded, the masks do not fit, or the loss is
            not a scalar with a graph.

    Source: Evci, Ioannou, Keskin, Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", 2022,
    arXiv:2010.03533.
    """
    parameters = dict(named_parameters(network))
    weights = {name: weight for name, weight in parameters.items() if weight.requires_grad}
    if not weights:
        raise ValueError(f"{type(network).__name__} has no parameter that trains: set requires_grad")
    if sharded := [name for name, weight in weights.items() if hasattr(weight, "placements")]:
        raise ValueError(f"'{sharded[0]}' is sharded (DTensor): look at the network before fully_shard")
    kept = _fitting(masks or {}, parameters)
    home, count = next(iter(weights.values())).device, 0
    with preserve_state(network, training=True):
        sums = {name: torch.zeros_like(weight, dtype=_precise(weight)) for name, weight in weights.items()}
        for batch in batches(loader, home):
            value = scalar(loss(network, batch))
            for total_, grad in zip(sums.values(), torch.autograd.grad(value, [*weights.values()], allow_unused=True)):
                if grad is not None:
                    total_ += grad
            count += 1
    everyone = total_batches(count, home)
    all_reduce_sum(sums.values())
    norms = {name: _squared(grad, kept.get(name)) / everyone**2 for name, grad in sums.items()}
    layer_norms = [norms[name] for name in _layers(network) if name in norms]
    ratio = layer_norms[0] / layer_norms[-1] if layer_norms and layer_norms[-1] else None
    return {"total": sum(norms.values()), "layers": norms, "ratio": ratio}


def _fitting(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, mask in masks.items():
        if name not in parameters or mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask '{name}' of shape {tuple(mask.shape)} fits no parameter of the network: give masks by "
                "parameter name, of the parameters' shapes"
            )
    return masks


def _layers(network: nn.Module) -> list[str]:
    """Names of the weights of Linear and Conv layers, in definition order."""
    kinds = (nn.Linear, _ConvNd)
    layers = {id(m.weight) for m in network.modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
    return [name for name, weight in named_parameters(network) if id(weight) in layers]


def _precise(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.dtype == torch.float64 else torch.float32


def _squared(grad: Tensor, mask: Tensor | None) -> float:
    grad = grad if mask is None else grad.where(mask.to(grad.device), 0.0)
    return float(torch.linalg.vector_norm(grad, dtype=None if grad.device.type == "mps" else torch.float64)) ** 2
