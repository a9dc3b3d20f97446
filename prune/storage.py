"""Which parameters are one piece of memory: tied weights are one weight under several names."""

import torch
from torch import Tensor, nn


def shared_memory(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """All parameters under all their names, grouped by overlapping memory, in definition order.

    A parameter without memory to look at (meta, sparse, empty, a wrapper) is grouped with itself only.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    spans = [memory_span(parameter) for _, parameter in named]
    group_of, group, home, end = [0] * len(named), -1, None, 0
    for i in sorted(range(len(named)), key=spans.__getitem__):
        *where, start, stop = spans[i]
        if where != home or start >= end:
            group, home, end = group + 1, where, stop
        group_of[i], end = group, max(end, stop)
    groups: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for i, pair in enumerate(named):
        groups.setdefault(group_of[i], []).append(pair)
    return list(groups.values())


def memory_span(parameter: Tensor) -> tuple[str, int, int, int]:
    """(device, address of the storage, first byte in it, byte after the last) of a tensor."""
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout == torch.strided
    if not plain or parameter.is_meta or not parameter.numel():
        return ("object", id(parameter), 0, 1)
    size, start = parameter.element_size(), int(parameter.storage_offset())
    last = start + sum((int(n) - 1) * int(step) for n, step in zip(parameter.shape, parameter.stride()))
    return (str(parameter.device), parameter.untyped_storage().data_ptr(), start * size, (last + 1) * size)
