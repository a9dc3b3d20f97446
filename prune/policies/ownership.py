"""Who holds the weights that are decided about: wrappers of the model, optimizers, and no more than one policy."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.messages import some

_OWNERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def claim(policy: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """From now on ``policy`` alone decides about these.

    Raises:
        ValueError: If another one does.
    """
    for name, weight in weights.items():
        owner = _OWNERS.setdefault(id(weight), policy)
        if owner is not policy:
            raise ValueError(
                f"'{name}' is pruned by a {type(owner).__name__} and a {type(policy).__name__} at once: let one of "
                "them leave it out (include, exclude), or end the other first"
            )


def release(policy: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Let others decide about those of the weights that are ``policy``'s."""
    for weight in weights.values():
        if _OWNERS.get(id(weight)) is policy:
            del _OWNERS[id(weight)]


def leading(optimizers: Iterable[Optimizer], weights: Mapping[str, nn.Parameter]) -> Optimizer:
    """The first that holds one of the weights.

    Raises:
        ValueError: If none does.
    """
    known = {id(weight) for weight in weights.values()}
    for optimizer in optimizers:
        if any(id(held) in known for group in optimizer.param_groups for held in group["params"]):
            return optimizer
    raise ValueError(
        f"no optimizer holds a weight that is to be pruned, such as {some(weights)}: give the optimizer that trains "
        "this model"
    )


def skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler lets a fused optimizer's step do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@contextmanager
def scaled_back(scaler: Any, optimizers: Iterable[Any]) -> Iterator[None]:
    """Inside, the gradients that ``optimizers`` hold are without the scale of ``scaler``."""
    held = {id(p): p.grad for each in optimizers for group in each.param_groups for p in group["params"]}
    grads, scale = [grad for grad in held.values() if grad is not None], scaler.get_scale()
    if grads:  # the scale is a power of two: nothing is rounded
        torch._foreach_mul_(grads, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
    yield
    if grads:
        torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
