"""Criteria from gradients of the loss: SNIP, GraSP, first-order Taylor and movement.

All take ``loss(model, batch)``, a scalar that is the mean over the batch, and run the model in training mode as their
papers do: with dropout, and with the statistics of the batch in batch norms. Its buffers and torch's random state are
restored, so a second call gives the same scores.

Every batch has the same weight, of any size and rank. Gradients are those of ``torch.autograd.grad``: ``.grad`` is
neither read nor written. A weight that the loss does not use has gradient 0.

Legend: g = mean of the loss's gradient over batches, g_b = the gradient of one batch, w = weight; per element.
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


def snip(model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Connection sensitivity: how fast the loss changes when the connection is scaled down.

    Formula: ``|g * w|``. The paper divides by the sum over all weights, which changes no order.

    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019, arXiv:1810.02340,
    equations 4 and 5.

    When to use: before training, in one shot, on one batch as in the paper or on more.

    Args:
        model: differentiable, of any device and precision.
        weights: parameters of it by name.
        loader: batches, read once and not kept.
        loss: ``loss(model, batch)``, on the model's device.

    Returns:
        Scores by name, 0 or more, in fp32 or float64.

    Raises:
        ValueError: if the loader is empty, a weight is frozen, sharded or tied by memory alone, or the loss is not a
            scalar that depends on the weights.
    """
    mean = _mean(model, weights, loader, loss, lambda weight, grad: precise(grad))
    return {name: snip_step(weight, mean[name]) for name, weight in weights.items()}


def taylor(model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """The squared change of the loss without the weight, to first order.

    Formula: mean over batches of (g_b * w)^2.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771, I^(1)_m,
    averaged over minibatches.

    When to use: on trained networks, above all with structures such as ``channel`` and ``coupled``.

    Arguments and errors are those of ``snip``; scores are 0 or more.
    """
    return _mean(model, weights, loader, loss, taylor_step)


def movement(model: nn.Module, weights: Weights, loader: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """How far gradient descent moves the weight away from zero.

    Formula: mean over batches of -g_b * w. In the paper the weights are trained meanwhile: sum ``movement_step`` over
    the steps, as ``GradualPruning`` does.

    Source: Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, arXiv:2005.07683, Table 1.

    When to use: while a pretrained model is fine-tuned, at high sparsity.

    Arguments and errors are those of ``snip``; scores have either sign.
    """
    return _mean(model, weights, loader, loss, movement_step)


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
) -> dict[str, Tensor]:
    """Mean over the batches of all ranks of ``addend(weight, derivative)``."""
    check(model, weights)
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"{some(frozen)} are frozen, so the loss has no gradient there: set requires_grad, or exclude them"
        )
    device, count = next(iter(weights.values())).device, 0
    with preserve_state(model, training=True):
        sums = {name: torch.zeros_like(precise(weight)) for name, weight in weights.items()}
        for batch in batches(loader, device):
            value = scalar(loss(model, batch))
            gradients = _gradients(value, weights) if derive is None else derive(value)
            for (name, weight), grad in zip(weights.items(), gradients):
                if grad is not None:
                    sums[name] += addend(weight, grad)
            count += 1
        batches_of_all_ranks = total_batches(count, device)
        all_reduce_sum(sums.values())
        return {name: each / batches_of_all_ranks for name, each in sums.items()}


def _gradients(value: Tensor, weights: Weights, create_graph: bool = False) -> Sequence[Tensor | None]:
    gradients = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    if all(grad is None for grad in gradients):
        raise ValueError(
            f"the loss depends on none of the {len(weights)} weights: compute it from what the model returns"
        )
    return gradients
