"""Calling a model on example inputs without changing it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from workbench.models.forward import preserve_state, to_device


@contextmanager
def ready(model: nn.Module, example_inputs: Any) -> Iterator[Callable[[], Any]]:
    """Yields a function that calls ``model`` in eval mode, without gradients, on ``example_inputs`` on its device.

    Inputs are a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
    """
    first = next(chain(model.parameters(), model.buffers()), None)
    inputs = to_device(example_inputs, torch.device("cpu") if first is None else first.device)
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    listed = () if named else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with preserve_state(model, training=False), torch.no_grad():
        yield lambda: model(*listed, **named)
