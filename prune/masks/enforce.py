"""Enforcing masks on a model: weights that stay zero in any training loop, their gradients and optimizer state.

Functions take masks first, as parameter name -> bool tensor of the parameter's whole shape; ``prune.Masks`` has them
as methods. Each rank masks its shard of a DTensor with its part of the mask, without communication. Names are those of
the model without wrappers (:mod:`workbench.models.wrappers`), in whatever it is trained.

Masking gradients is not enough: momentum and weight decay move weights that have no gradient. So weights are multiplied
by their masks after every step of the optimizer, as integers: 0.0 times NaN or infinity is NaN, 0.0 times a negative
number is -0.0, but 0 times the bits of any float is +0.0.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prune.masks.memory import distributed, local, memory_span, owners, shard, shared_memory, summed
from prune.masks.stepping import hook_steps, unwrap_optimizer
from workbench.messages import nearest, some
from workbench.models.wrappers import Place, places, without_prefixes

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Handle:
    """Removes hooks; as a context manager also after an exception.

    Args:
        removers: Called once, the last one first.
        at_end: Called before them, unless an exception ends the context.
    """

    def __init__(self, removers: Iterable[Callable[[], None]], at_end: Callable[[], None] = lambda: None):
        self._removers, self._at_end = list(removers), at_end

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        try:
            if self._removers:
                self._at_end()
        finally:
            while self._removers:
                self._removers.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._at_end = lambda: None
        self.remove()


@torch.no_grad()
def apply(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Set masked weights to +0.0 in place, also negative, infinite and NaN ones, on any device.

    A running average of the weights, EMA or SWA, stays masked while it follows a model that is kept masked: apply masks
    to it, too, when they change.

    Raises:
        ValueError: if a name or shape does not belong to ``model``, or a parameter cannot be masked (meta, sparse,
            quantised).
    """
    for name, parameter in _maskable(masks, model).items():
        _fill(parameter, masks[name])


def keep(masks: Mapping[str, Tensor], optimizer: Any, model: nn.Module) -> Handle:
    """From now on, multiply the weights by their masks after every step of ``optimizer``, in any loop.

    Call ``apply`` first; this acts only after a step. A masked weight is +0.0 after it, even if the step made it
    negative, infinite or NaN (complex128 excepted). Where the optimizer evaluates a closure inside its step (L-BFGS,
    SAM), weights and gradients are masked at every evaluation (:mod:`prune.masks.stepping`). Masks follow a model that
    changes device or dtype, or is sharded.
    The model and its state dict get no new keys or hooks; a copy of the optimizer does not have this hook.

    Args:
        masks: the masks.
        optimizer: one optimizer, or a list of them; a wrapper with an ``optimizer`` attribute (accelerate's,
            Lightning's), or a ``base_optimizer`` (SAM), is unwrapped.
        model: the model whose weights are masked. Its parameters are looked up at every step.

    Returns:
        A handle; ``handle.remove()`` or leaving ``with handle:`` ends it.

    Raises:
        TypeError: if something is not an optimizer.
        ValueError: if a name or shape does not belong to ``model``, a parameter cannot be masked, or no optimizer
            holds any of the masked weights.
    """
    several = isinstance(optimizer, (list, tuple))
    optimizers = [unwrap_optimizer(each) for each in (optimizer if several else [optimizer])]
    members = _members(masks, model)
    optimized = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    if not any(id(member.parameter) in optimized for group in members.values() for member in group):
        raise ValueError(
            f"the optimizer holds none of the masked weights ({some(masks)}), so its steps do not move "
            "them: give the optimizer that trains this model"
        )
    given = optimizer if several else [optimizer]
    mask_weights, gradients = mask_multiplier(masks, model), partial(mask_gradients, masks, model)
    return Handle([remove for each in given for remove in hook_steps(each, mask_weights, gradients)])


def mask_multiplier(masks: Mapping[str, Tensor], model: nn.Module) -> Callable[..., None]:
    """The hook of ``keep``: multiplies the weights by their masks, and ignores its arguments."""
    # Places and not parameters: ``model.to`` and ``fully_shard`` may replace parameters.
    places_of = {name: place for name, place in _resolve(masks, model).items() if not masks[name].all()}
    factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def mask_weights(*_: Any) -> None:
        weights = []
        for name, place in places_of.items():
            parameter = place.parameter
            weight = _bits(local(parameter))
            if name not in factors or not _same_kind(factors[name], weight):
                factors[name] = torch.empty_like(weight).copy_(shard(masks[name], parameter))
            weights.append(weight)
        if weights:
            torch._foreach_mul_(weights, [factors[name] for name in places_of])  # pyright: ignore[reportPrivateImportUsage]

    return mask_weights


@torch.no_grad()
def mask_gradients(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Zero the gradients of masked weights; before clipping, so that they do not count in the norm.

    Raises:
        ValueError: if a name or shape does not belong to ``model``, or a parameter or its gradient cannot be masked.
    """
    for name, group in _members(masks, model).items():
        for member in group:
            if (gradient := member.parameter.grad) is not None:
                _refuse(f"the gradient of '{name}'", gradient)
                _fill(gradient, member.view_of(masks[name]))


@torch.no_grad()
def clear_state(masks: Mapping[str, Tensor], optimizer: Any, model: nn.Module) -> None:
    """Zero the optimizer state of masked weights, such as their momentum.

    Every state tensor of the parameter's shape is cleared; state of another shape (LBFGS keeps all parameters in one
    vector) stays.

    Raises:
        TypeError: if ``optimizer`` is not one.
        ValueError: if a name or shape does not belong to ``model``, or a parameter cannot be masked.
    """
    states = unwrap_optimizer(optimizer).state
    for name, group in _members(masks, model).items():
        for member in group:
            for key, value in states.get(member.parameter, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.shape == member.parameter.shape:
                    _fill(value, member.view_of(masks[name]))


@torch.no_grad()
def is_applied_to(masks: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether the masks fit ``model`` and all masked weights are zero, on every rank that has a shard."""
    try:
        parameters = _maskable(masks, model)
    except ValueError:
        return False
    return not any(
        summed(local(parameter)[~shard(masks[name], parameter)].count_nonzero(), owners(parameter))
        for name, parameter in parameters.items()
    )


def masked_parameters(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, nn.Parameter]:
    """The masked parameters of ``model`` by the masks' names, after checking names and shapes."""
    return {name: place.parameter for name, place in _resolve(masks, model).items()}


def _resolve(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, Place]:
    """Name of the mask -> where ``model`` has its parameter, after checking names and shapes."""
    plain = places(model)
    in_model = {place.path: place for place in plain.values()}
    # Masks may have been made of a model in another wrapper, by names that only say so.
    matches = {name: plain.get(name) or in_model.get(name) or plain.get(without_prefixes(name)) for name in masks}
    missing = [name for name, place in matches.items() if place is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(masks)} masks name no parameter of this {type(model).__name__}: "
            f"{some(missing)}. Give the model that the masks were made for{nearest(missing[0], plain)}"
        )
    resolved = {name: place for name, place in matches.items() if place is not None}
    for name, place in resolved.items():
        if (shape := place.parameter.shape) != masks[name].shape:
            raise ValueError(
                f"mask '{name}' has shape {tuple(masks[name].shape)}, the parameter {tuple(shape)}: "
                "give the model that the masks were made for"
            )
    return resolved


def _maskable(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, nn.Parameter]:
    """The masked parameters by name, after checking that they fit and have values that can be set to zero."""
    parameters = masked_parameters(masks, model)
    for name, parameter in parameters.items():
        _refuse(f"'{name}'", parameter)
    return parameters


def _refuse(what: str, tensor: Tensor) -> None:
    kind = None
    if tensor.is_meta:
        kind = "on the meta device, without values: materialise it first"
    elif tensor.layout != torch.strided:
        kind = f"stored as {tensor.layout}: make it dense first"
    elif not (tensor.is_floating_point() or tensor.is_complex()):
        kind = f"of type {tensor.dtype}: dequantise it first, or leave it out of the masks"
    elif is_traceable_wrapper_subclass(tensor) and not distributed(tensor):
        kind = (
            f"a {type(tensor).__name__}, which has no plain values: dequantise it first, or leave it out of the masks"
        )
    if kind is not None:
        raise ValueError(f"{what} cannot be masked, it is {kind}")


def _members(masks: Mapping[str, Tensor], model: nn.Module) -> "dict[str, list[_Member]]":
    """Each masked name with all parameters in the same memory: a weight may be tied by storage alone."""
    groups = {id(parameter): group for group in shared_memory(model) for _, parameter in group}
    members = {}
    for name, owner in _maskable(masks, model).items():
        unique = {id(parameter): parameter for _, parameter in groups[id(owner)]}
        members[name] = [_Member(owner, parameter) for parameter in unique.values()]
    return members


class _Member(NamedTuple):
    """A parameter in the memory of ``owner``, the parameter that a mask is named after."""

    owner: nn.Parameter
    parameter: nn.Parameter

    def view_of(self, mask: Tensor) -> Tensor:
        """The owner's mask in this parameter's shape and strides, such as transposed."""
        owner, parameter = self.owner, self.parameter
        if parameter is owner or (parameter.shape, parameter.stride()) == (owner.shape, owner.stride()):
            return mask
        if memory_span(parameter) != memory_span(owner) or parameter.numel() != owner.numel():
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} shares only part of the memory of a masked "
                f"one of shape {tuple(owner.shape)}: untie them"
            )
        memory = torch.empty_strided(owner.shape, owner.stride(), dtype=torch.bool, device=mask.device).copy_(mask)
        return memory.as_strided(parameter.shape, parameter.stride(), 0)


def _bits(weight: Tensor) -> Tensor:
    """``weight`` as integers in its own memory: 0 times any of them is +0.0, also where they mean NaN or infinity."""
    kind = _INTEGERS.get(weight.dtype.itemsize)
    return weight if kind is None else weight.view(kind)


def _same_kind(factor: Tensor, weight: Tensor) -> bool:
    return factor.dtype == weight.dtype and factor.device == weight.device and factor.shape == weight.shape


def _fill(values: Tensor, mask: Tensor) -> None:
    local(values).masked_fill_(~shard(mask, values), 0)
