"""How a model is looked at through batches: it is left as it was, and every rank has a part of them. Torch only."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.distributed.ranks import world_size
from workbench.models.wrappers import unwrap

LABELS = ("label", "labels", "label_ids")


@contextmanager
def preserve_state(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, gradients are on and ``model`` is in the given mode.

    Afterwards its modes, its buffers and torch's random state are as they were, also after an exception.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device.index for device in devices]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def batches(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches of ``loader`` on ``device``, one at a time."""
    for batch in loader:
        yield to_device(batch, device)


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` on ``device``: tensors and objects with a ``to``, in mappings, lists and tuples."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model: a batch without its labels.

    A mapping is passed by keyword, without the entries ``label``, ``labels`` and ``label_ids``; a tuple or list by
    position, without its last entry if it has several; a tensor as the only argument.

    Raises:
        ValueError: If the batch is none of these.
    """
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items() if name not in LABELS}
    if isinstance(batch, (tuple, list)) and batch:
        return tuple(batch[:-1] if len(batch) > 1 else batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise ValueError(
        f"a batch is {type(batch).__name__}: give a mapping, a tuple or list of inputs and last the labels, or a tensor"
    )


def keywords_of(model: Any) -> tuple[str, ...] | None:
    """Names of the keyword arguments that a network or function takes, in its order; None if it takes any.

    A transformers model takes those that its ``forward`` names: its ``**kwargs`` are options, no inputs.
    """
    network = unwrap(model, adapters=True) if isinstance(model, nn.Module) else model
    call = network.forward if isinstance(network, nn.Module) else network
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters) and not hasattr(network, "main_input_name"):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(each.name for each in parameters if each.kind in named)


def forward(model: nn.Module, batch: Any) -> Any:
    """``model`` on the inputs of a batch, see :func:`inputs_of`.

    Raises:
        ValueError: If the model does not take them.
    """
    args, kwargs = inputs_of(batch)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        kind = f"arguments {list(kwargs)}" if kwargs else "one argument" if len(args) == 1 else f"{len(args)} arguments"
        raise ValueError(
            f"{type(model).__name__} cannot be called with {kind} of a batch ({error}): give a loader of mappings of "
            "its arguments, or of tuples of its inputs and last the labels"
        ) from error


def scalar(value: Any) -> Tensor:
    """A loss, checked.

    Raises:
        ValueError: if it is not a scalar tensor with a graph.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the loss is {kind}: loss(model, batch) must return a scalar tensor, the mean over the batch")
    if not value.requires_grad:
        raise ValueError("the loss has no graph: compute it from what the model returns, without no_grad or detach")
    return value.reshape(())


def all_reduce_sum(sums: Iterable[Tensor]) -> None:
    """Add up tensors over all ranks, in place; called on every rank."""
    if world_size() > 1:
        for tensor in sums:
            torch.distributed.all_reduce(tensor)


def total_batches(count: int, device: torch.device) -> int:
    """How many batches all ranks had; called on every rank.

    Raises:
        ValueError: if none had any.
    """
    counted = torch.tensor(count, device=device)
    all_reduce_sum([counted])
    if not counted:
        raise ValueError(
            "the loader is empty: give at least one batch (an iterator that was read before has none left)"
        )
    return int(counted)
