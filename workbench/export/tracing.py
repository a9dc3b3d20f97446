"""Tracing a network for export: example arguments, and which of their dimensions vary."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.export.inputs import arguments_of


@contextmanager
def tracing(
    network: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor], Any]]:
    """Arguments to trace with and which of their dimensions vary; a failure to trace becomes a ValueError."""
    # torch.export would take a batch of one for a constant.
    several = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in inputs.items()}
    args, kwargs = arguments_of(several)
    try:
        yield args, kwargs, _dynamic(network, args, kwargs)
    except Exception as error:  # the tracer's errors have no common class
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(network).__name__} cannot be traced, which formats torch and onnx need: {reason}; "
            "export compact only"
        ) from error


def _dynamic(network: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Any:
    """Which dimensions may vary: the batch, and where token ids go in, their number."""
    dim = torch.export.Dim

    def free(value: Tensor) -> dict[int, Any]:
        inner = {} if value.is_floating_point() else dict.fromkeys(range(1, value.dim()), dim.AUTO)
        return {0: dim.DYNAMIC, **inner}

    by_name = {name: free(value) for name, value in kwargs.items()}
    if not kwargs:
        return tuple(free(value) for value in args)
    names = list(inspect.signature(network.forward).parameters)
    return {**{name: free(value) for name, value in zip(names, args)}, **by_name}
