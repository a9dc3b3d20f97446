"""Which optimizer's steps count as updates, and gradients with and without the factor of a gradient scaler."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from workbench.messages import some


def first_holding(optimizers: Iterable[Optimizer], weights: Mapping[str, nn.Parameter]) -> Optimizer:
    """The first optimizer that holds one of the weights.

    Raises:
        ValueError: If none does.
    """
    pruned = {id(weight) for weight in weights.values()}
    for optimizer in optimizers:
        if any(id(parameter) in pruned for group in optimizer.param_groups for parameter in group["params"]):
            return optimizer
    raise ValueError(
        f"no optimizer holds a weight that is to be pruned, such as {some(weights)}: give the optimizer that trains "
        "this model"
    )


def skips_step(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler makes the step of a fused optimizer do nothing; known from its beginning."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


@contextmanager
def unscaled(scaler: Any, optimizers: Iterable[Any]) -> Iterator[None]:
    """Inside, gradients are without the factor of ``scaler``, where it has one and has not removed it itself yet.

    Optimizers whose gradients the scaler has unscaled are left alone; those that unscale in their own step, as fused
    ones do, are among the others.
    """
    if scaler is None or not scaler.is_enabled():
        yield
        return
    # torch keeps per optimizer whether unscale_() has run, and has no public way to read it.
    states = scaler._per_optimizer_states
    scaled = [optimizer for optimizer in optimizers if states[id(optimizer)]["stage"] is OptState.READY]
    held = {id(p): p.grad for each in scaled for group in each.param_groups for p in group["params"]}
    gradients, scale = [gradient for gradient in held.values() if gradient is not None], scaler.get_scale()
    if gradients:  # the scale is a power of two: nothing is rounded
        torch._foreach_mul_(gradients, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
    yield
    if gradients:
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
