"""The steps of optimizers in wrappers and around one another, and what an optimizer evaluates inside its step.

A hook after the step is too late for an optimizer that calls its closure several times: the line search of L-BFGS, or
SAM, moves masked weights and measures the loss of a denser network there. So at every evaluation weights are masked
before, and gradients after it: the search stays among networks that obey the masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

_INNER = ("optimizer", "base_optimizer")


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The innermost optimizer, inside what has it as its ``optimizer`` or ``base_optimizer``.

    Raises:
        TypeError: If there is none.
    """
    inner = _chain(optimizer)[-1]
    if not isinstance(inner, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an optimizer: give a torch.optim.Optimizer or its wrapper")
    return inner


def hook_steps(
    optimizer: Any, mask_weights: Callable[..., None], mask_gradients: Callable[[], None]
) -> list[Callable[[], None]]:
    """Call ``mask_weights`` after every step, and both at every evaluation inside a step; what removes the hooks.

    Steps are those of the innermost optimizer, and of optimizers around it that move weights once more, as Lookahead
    does.
    """
    removers = []
    for each in _stepping(optimizer):
        removers.append(each.register_step_post_hook(mask_weights).remove)
        if _evaluates(each):
            removers.append(each.register_step_pre_hook(_wrapping(mask_weights, mask_gradients)).remove)
    return removers


def _chain(optimizer: Any) -> list[Any]:
    """The optimizer, what it holds, and so on."""
    chain = [optimizer]
    while held := [each for name in _INNER if (each := getattr(chain[-1], name, None)) is not None]:
        chain.append(held[0])
    return chain


def _stepping(optimizer: Any) -> list[Optimizer]:
    """Those of the chain that run hooks; wrappers that share the hooks of what they wrap (Fabric's) come once."""
    by_hooks: dict[int, Optimizer] = {}
    for each in _chain(optimizer):
        hooks = vars(each).get("_optimizer_step_post_hooks") if isinstance(each, Optimizer) else None
        if hooks is not None:
            by_hooks[id(hooks)] = each
    return list(by_hooks.values())


def _evaluates(optimizer: Optimizer) -> bool:
    """Whether it may call its closure several times; of torch's own only L-BFGS does."""
    own = next(cls for cls in type(optimizer).__mro__ if not cls.__name__.startswith("Fabric"))
    return isinstance(optimizer, torch.optim.LBFGS) or not own.__module__.startswith("torch.optim")


def _wrapping(mask_weights: Callable[..., None], mask_gradients: Callable[[], None]) -> Any:
    def masked(closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            mask_weights()
            value = closure()
            mask_gradients()
            return value

        return evaluate

    def wrapped(value: Any) -> Any:
        return masked(value) if callable(value) and not isinstance(value, Optimizer) else value

    def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {name: wrapped(value) if name == "closure" else value for name, value in kwargs.items()}
        return tuple(map(wrapped, args)), named

    return before
