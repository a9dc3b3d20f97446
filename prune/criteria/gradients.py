"""Criteria from gradients of the loss: SNIP, GraSP, first-order Taylor and movement.

All take ``loss(model, batch)``, a scalar that is the mean over the batch, and run the model in training mode as their
papers do: with dropout, and with the statistics of the batch in batch norms. Its buffers and torch's random state are
restored, so a second call gives the same scores.

Every batch has the same weight, of any size and rank. Gradients are those of ``torch.autograd.grad``: ``.grad`` is
neither read nor written. A weight that the loss does not use has gradient 0.

Legend: g = mean of the loss's gradient over batches, g_b = the gradient of one batch, w = weight; per element. Sum_S is
the sum over the weights of a unit S, such as a channel: g_b times w summed over S is the derivative of the loss by a
gate of 1 that multiplies the unit, which is what the papers score where they prune units.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prune.criteria.weights import check, precise
from workbench.messages import some
from workbench.models.forward import all_reduce_sum, batches, preserve_state, scalar, total_batches

Loss = Callable[[nn.Module, Any], Tensor]
Weights = Mapping[str, nn.Parameter]
Units = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def snip(
    model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss, units: Units | None = None
) -> dict[str, Tensor]:
    """Connection sensitivity: how fast the loss changes when the connection is scaled down.

    Formula: ``|g * w|``; of a unit ``|Sum_S g * w|``. The paper divides by the sum over all weights, which changes no
    order.

    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019, arXiv:1810.02340,
    equations 4 and 5; of units Michel et al., Are Sixteen Heads Really Better than One?, 2019, arXiv:1905.10650,
    equation 2 (there the absolute value is of every sample; here it is of the batches together, as in SNIP).

    When to use: before training, in one shot, on one batch as in the paper or on more.

    Args:
        model: differentiable, of any device and precision.
        weights: parameters of it by name.
        loader: batches, read once and not kept.
        loss: ``loss(model, batch)``, on the model's device.
        units: sums values of weights over units, name -> [units]; the units are scored then, under these names.

    Returns:
        Scores by name, 0 or more, in fp32 or float64.

    Raises:
        ValueError: if the loader is empty, a weight is frozen, sharded or tied by memory alone, or the loss is not a
            scalar that depends on the weights.
    """
    mean = _mean(model, weights, loader, loss, lambda weight, grad: precise(grad))
    products = {name: mean[name] * precise(weight) for name, weight in weights.items()}
    return {name: product.abs() for name, product in (units(products) if units else products).items()}


def taylor(
    model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss, units: Units | None = None
) -> dict[str, Tensor]:
    """The squared change of the loss without the weight, or without the unit, to first order.

    Formula: mean over batches of (g_b * w)^2; of a unit the mean over batches of (Sum_S g_b * w)^2.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771, section 3:
    I^(1)_m, and of units the group contribution I^(1)_S, which is that of a gate; squared in every minibatch, then
    averaged over minibatches.

    When to use: on trained networks, above all with structures such as ``channel`` and ``coupled``.

    Arguments and errors are those of ``snip``; scores are 0 or more.
    """
    return _mean(model, weights, loader, loss, taylor_step, units=units)


def movement(
    model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss, units: Units | None = None
) -> dict[str, Tensor]:
    """How far gradient descent moves the weight away from zero.

    Formula: mean over batches of -g_b * w; of a unit of -Sum_S g_b * w. In the paper the weights are trained meanwhile:
    sum ``movement_step`` over the steps, as ``GradualPruning`` does.

    Source: Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, arXiv:2005.07683, Table 1; of units
    Lagunas et al., Block Pruning For Faster Transformers, 2021, arXiv:2109.04838, section 3 (one score for a block).

    When to use: while a pretrained model is fine-tuned, at high sparsity.

    Arguments and errors are those of ``snip``; scores have either sign.
    """
    return _mean(model, weights, loader, loss, movement_step, units=units)


def grasp(model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Gradient signal preservation: positive if the gradient shrinks without the weight.

    Formula: w * Hg, with H the Hessian of the mean loss. The paper's score is its negative, of which the *largest* are
    pruned.

    Source: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020, arXiv:2002.07376,
    Algorithms 1 and 2. Its code divides logits by 200, which belongs into ``loss``
    (``cross_entropy(model(x) / 200, y)``).

    When to use: before training, in one shot, at high sparsity. Costs two passes, the second with second derivatives.

    Arguments and errors are those of ``snip``; scores have either sign. Batches are kept between the two passes, on the
    device that the loader gave them on. Attention and recurrent layers are computed without fused kernels, which have
    no second derivative.
    """
    with torch.random.fork_rng(devices=[]):
        kept = list(loader)
    # Hg is the gradient of <g, g_b> with g held fixed, so g, the mean over all batches, is needed first.
    mean = list(_mean(model, weights, kept, loss, lambda weight, grad: precise(grad)).values())

    def product(value: Tensor) -> list[Tensor | None]:
        gradients = _gradients(value, weights, create_graph=True)
        terms = [(grad.to(at.dtype) * at).sum() for grad, at in zip(gradients, mean) if grad is not None]
        flow = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        if not flow.requires_grad:  # a loss that is linear in the weights
            return [None] * len(mean)
        return list(torch.autograd.grad(flow, list(weights.values()), allow_unused=True))

    unfused = torch.backends.cudnn.flags(enabled=False) if _is_recurrent(model) else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), unfused:
        curvature = _mean(model, weights, kept, loss, lambda weight, grad: precise(grad), product)
    return {name: precise(weight) * curvature[name] for name, weight in weights.items()}


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def snip_step(weight: Tensor, grad: Tensor) -> Tensor:
    """``|g * w|`` of one training step, in fp32 or float64."""
    return (precise(grad) * precise(weight)).abs()


def taylor_step(weight: Tensor, grad: Tensor) -> Tensor:
    """(g * w)^2 of one training step, in fp32 or float64."""
    return (precise(grad) * precise(weight)).square()


def movement_step(weight: Tensor, grad: Tensor) -> Tensor:
    """-g * w of one training step, in fp32 or float64."""
    return -(precise(grad) * precise(weight))


def _mean(
    model: nn.Module,
    weights: Weights,
    loader: Iterable[Any],
    loss: Loss,
    addend: Callable[[Tensor, Tensor], Tensor],
    derive: Callable[[Tensor], Sequence[Tensor | None]] | None = None,
    units: Units | None = None,
) -> dict[str, Tensor]:
    """Mean over the batches of all ranks of ``addend(weight, derivative)``; of ``units`` that of their gates."""
    check(model, weights)
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"{some(frozen)} are frozen, so the loss has no gradient there: set requires_grad, or exclude them"
        )
    device, count = next(iter(weights.values())).device, 0
    with preserve_state(model, training=True):
        sums = {name: torch.zeros_like(precise(weight)) for name, weight in weights.items()}
        homes: dict[str, torch.device] = {}
        if units is not None:  # they may be on the CPU, but ranks add up on their own device; MPS has no float64
            sums = units(sums)
            homes = {name: zeros.device for name, zeros in sums.items()}
            sums = {n: zeros if device.type == "mps" else zeros.to(device) for n, zeros in sums.items()}
        for batch in batches(loader, device):
            value = scalar(loss(model, batch))
            gradients = _gradients(value, weights) if derive is None else derive(value)
            found = {name: grad for name, grad in zip(weights, gradients) if grad is not None}
            if units is None:
                for name, grad in found.items():
                    sums[name] += addend(weights[name], grad)
            else:
                for name, grad in _gates(weights, found, units).items():
                    sums[name] += addend(torch.ones_like(grad), grad).to(sums[name].device)
            count += 1
        batches_of_all_ranks = total_batches(count, device)
        all_reduce_sum(sums.values())
        means = {name: each / batches_of_all_ranks for name, each in sums.items()}
        return {name: mean.to(homes.get(name, mean.device)) for name, mean in means.items()}


def _gates(weights: Weights, gradients: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
    """The derivative of the loss by a gate of every unit: the sum over its weights of gradient times weight."""
    zeros = {name: torch.zeros_like(precise(weight)) for name, weight in weights.items() if name not in gradients}
    return units(zeros | {name: precise(grad) * precise(weights[name]) for name, grad in gradients.items()})


def _gradients(value: Tensor, weights: Weights, create_graph: bool = False) -> Sequence[Tensor | None]:
    gradients = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    if all(grad is None for grad in gradients):
        raise ValueError(
            f"the loss depends on none of the {len(weights)} weights: compute it from what the model returns"
        )
    return gradients
