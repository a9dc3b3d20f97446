"""Whether two networks compute the same: calls to try them with, their outputs, and what counts as rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workbench.export.inputs import arguments_for
from workbench.models.copying import copied


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

    def on_device_of(self, model: nn.Module) -> "Call":
        """The same arguments on the model's device."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return self._each(lambda value: value.to(device))

    def double(self) -> "Call":
        """The same arguments in float64."""
        return self._each(lambda value: value.double() if value.is_floating_point() else value)

    def randomized(self, seed: int = 0) -> "Call":
        """Random values of the same shapes and types, in about the same range.

        Integers with at most two values are treated as flags, such as a mask, and stay as they are.
        """
        random = torch.Generator().manual_seed(seed)

        def draw(value: Tensor) -> Tensor:
            if not value.numel() or value.dtype == torch.bool or value.is_complex():
                return value
            if value.is_floating_point():
                std, mean = value.double().std(correction=0).clamp(min=0.1), value.double().mean()
                noise = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value.device)
                return (noise * std + mean).to(value.dtype)
            low, high = int(value.min()), int(value.max())
            if high - low < 2:
                return value
            return torch.randint(low, high + 1, value.shape, generator=random, dtype=value.dtype).to(value.device)

        return self._each(draw)

    def variants(self) -> "list[Call]":
        """Less similar calls, which a model may refuse: another range, other flags, half as long or as large."""
        random = torch.Generator().manual_seed(1)

        def far(value: Tensor) -> Tensor:
            if value.is_floating_point():
                return -100 * value
            if not value.numel() or value.is_complex() or int(value.max()) - int(value.min()) > 1 or value.max() > 1:
                return value
            flips = (torch.rand(value.shape, generator=random) < 0.5).to(value.device)
            return torch.where(flips, 1 - value.to(torch.int8), value).to(value.dtype)

        def halved(value: Tensor, dims: range) -> Tensor:
            for dim in dims:
                value = value.narrow(dim, 0, (value.shape[dim] + 1) // 2)
            return value

        return [
            self._each(far),
            self._each(lambda value: halved(value, range(1, min(2, value.dim())))),
            self._each(lambda value: halved(value, range(2, value.dim()))),
        ]

    def run(self, model: nn.Module) -> Any:
        """What ``model`` returns."""
        return model(*self.args, **self.kwargs)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        """The tensors and numbers that ``model`` returns, in order."""
        return list(tensors_of(self.run(model)))

    def _each(self, change: Any) -> "Call":
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(changed, self.args)), {name: changed(value) for name, value in self.kwargs.items()})


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors and numbers in what a model returned; a cache of keys and values does not count as returned.

    Raises:
        ValueError: if there is something that cannot be looked into.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (bool, int, float)):
        yield torch.tensor(output, dtype=torch.float64 if isinstance(output, float) else None)
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_of(getattr(output, field.name))
    elif not (output is None or isinstance(output, str) or any(c.__name__ == "Cache" for c in type(output).__mro__)):
        raise ValueError(
            f"the model returns {type(output).__name__}, which cannot be compared: let it return tensors, in tuples, "
            "lists, mappings or dataclasses"
        )


def outputs_of(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """All outputs of the model, one call after the other.

    Raises:
        ValueError: if the model cannot be called so, or returns no floating-point tensor.
    """
    try:
        outputs = [value for call in calls for value in call.outputs(model)]
    except Exception as error:  # a forward pass may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be called with example_inputs ({type(error).__name__}: {_reason(error)}): "
            "give what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments"
        ) from error
    if not any(value.is_floating_point() for value in outputs):
        raise ValueError(f"{type(model).__name__} returns no floating-point tensor, by which it could be compared")
    return outputs


def float64_outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The outputs of a float64 copy of a model that ``calls`` are known to fit.

    Raises:
        ValueError: if it cannot be called in float64.
    """
    try:
        return outputs_of(model, calls)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called in float64, in which it is checked "
            f"({_reason(error.__cause__ or error)}): it makes tensors of a fixed type inside, as by x.float() or "
            "torch.zeros(n): let it make them of the type of its weights, as by x.to(self.layer.weight.dtype)"
        ) from error


def accepts(model: nn.Module, call: Call) -> bool:
    """Whether the model can be called so, with finite outputs."""
    try:
        return all(bool(value.isfinite().all()) for value in call.outputs(model))
    except Exception:  # a forward pass may raise anything
        return False


def accepts_in_training(model: nn.Module, call: Call) -> bool:
    """Whether the model can be called so in training mode; it is not changed."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            call.outputs(copied(model).train())
        except Exception:  # a forward pass may raise anything
            return False
    return True


def differences(one: list[Tensor], other: list[Tensor]) -> list[float]:
    """The largest difference of every two outputs; infinite if shapes differ, or values that are not floating."""
    if [value.shape for value in one] != [value.shape for value in other]:
        return [float("inf")] * len(one)
    largest = []
    for a, b in zip(one, other):
        if not a.is_floating_point():
            largest.append(0.0 if torch.equal(a, b) else float("inf"))
            continue
        # Infinities and NaNs in the same places are no difference.
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs())
        largest.append(float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0)
    return largest


def tolerances(outputs: list[Tensor], eps: float) -> list[float]:
    """For every output the difference that counts as rounding: 1024 eps of its largest value, but 1e-3 at most."""
    return [min(1024 * eps, 1e-3) * magnitude(value) for value in outputs]


def magnitude(value: Tensor) -> float:
    """The largest finite magnitude in a floating-point tensor, 1e-6 at least; 0 of any other."""
    if not value.is_floating_point():
        return 0.0
    return max(1e-6, float(value.abs().nan_to_num(0, 0, 0).max()) if value.numel() else 0.0)


def within_tolerances(one: list[Tensor], other: list[Tensor], allowed: list[float]) -> bool:
    """Whether no two outputs differ by more than their tolerance."""
    return all(difference <= limit for difference, limit in zip(differences(one, other), allowed))


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class CoarsestDtype(TorchFunctionMode):
    """Records the coarsest floating-point type that anything inside is computed in, by its ``eps``.

    A float64 copy of a model may still compute parts in fp32, as by ``x.float()``: then tolerances follow that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.eps = max(self.eps, torch.finfo(out.dtype).eps)
        return out


def example_call(network: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Inputs by name as the positional or keyword arguments that the network takes, in its dtype."""
    args, kwargs = arguments_for(network, inputs)
    return args or kwargs
