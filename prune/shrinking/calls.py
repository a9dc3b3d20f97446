"""What a network is called with, and what it answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """Arguments of a forward pass.

    Attributes:
        args: positional ones.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> "Call":
        """One tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

        Raises:
            ValueError: if there is no tensor among them.
        """
        args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        call = cls(args, dict(inputs) if isinstance(inputs, Mapping) else {})
        if not any(isinstance(value, Tensor) for value in (*call.args, *call.kwargs.values())):
            raise ValueError(
                f"example_inputs is {type(inputs).__name__} without a tensor: give what the model is called with: a "
                "tensor, a tuple of arguments, or a mapping of keyword arguments"
            )
        return call

    def beside(self, model: nn.Module) -> "Call":
        """The same on the model's device."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return self._each(lambda value: value.to(device))

    def double(self) -> "Call":
        """The same in float64."""
        return self._each(lambda value: value.double() if value.is_floating_point() else value)

    def drawn(self, seed: int = 0) -> "Call":
        """Random values of the same shapes and types, in about the same range.

        Integers with only two values or one are taken for flags, such as a mask, and stay.
        """
        random = torch.Generator().manual_seed(seed)

        def draw(value: Tensor) -> Tensor:
            if not value.numel() or value.dtype == torch.bool or value.is_complex():
                return value
            if value.is_floating_point():
                spread, middle = value.double().std(correction=0).clamp(min=0.1), value.double().mean()
                noise = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value.device)
                return (noise * spread + middle).to(value.dtype)
            low, high = int(value.min()), int(value.max())
            if high - low < 2:
                return value
            return torch.randint(low, high + 1, value.shape, generator=random, dtype=value.dtype).to(value.device)

        return self._each(draw)

    def run(self, model: nn.Module) -> Any:
        """What ``model`` returns."""
        return model(*self.args, **self.kwargs)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        """The floating-point tensors that ``model`` returns, in order."""
        return list(tensors_of(self.run(model)))

    def _each(self, change: Any) -> "Call":
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(changed, self.args)), {name: changed(value) for name, value in self.kwargs.items()})


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned; a cache of keys and values does not count as returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)


def answers(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """All floating-point outputs, one call after the other.

    Raises:
        ValueError: if the model cannot be called so, or returns no such tensor.
    """
    try:
        found = [value for call in calls for value in call.outputs(model)]
    except Exception as error:  # whatever a forward pass does with arguments it does not expect
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be called with example_inputs ({type(error).__name__}: {reason}): give "
            "what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments"
        ) from error
    if not found:
        raise ValueError(f"{type(model).__name__} returns no floating-point tensor, by which it could be compared")
    return found


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two answers; infinite if they have not the same shapes."""
    if [value.shape for value in one] != [value.shape for value in other]:
        return float("inf")
    largest = 0.0
    for a, b in zip(one, other):
        # Infinities and NaNs in the same places are no difference.
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs())
        largest = max(largest, float(apart.nan_to_num(float("inf")).max()) if apart.numel() else 0.0)
    return largest


def rounding(answers: list[Tensor], eps: float) -> float:
    """The largest difference that counts as rounding: 1024 eps of the largest value in the answers, or of 1e-3."""
    largest = (float(value.abs().nan_to_num(0, 0, 0).max()) for value in answers if value.numel())
    return 1024 * eps * max(*largest, 1e-3, 0)


class Coarsest(TorchFunctionMode):
    """Inside, notes the coarsest floating-point type that anything is computed in, by its ``eps``."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.eps = max(self.eps, torch.finfo(out.dtype).eps)
        return out
