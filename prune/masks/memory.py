"""Parameters in memory: tied weights are one weight under several names, a DTensor is divided over ranks."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.distributed.ranks import distributed as distributed  # of tensors, as all here
from workbench.models.wrappers import places


def shared_memory(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """All parameters under all their names without wrappers, grouped by overlapping memory, in definition order.

    A parameter without plain memory (meta, sparse, empty, a wrapper) is grouped with itself only.
    """
    named = [(name, place.parameter) for name, place in places(model).items()]
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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached, in the same memory: all of it, or its shard of a DTensor."""
    held: Any = tensor.detach()
    return held.to_local() if distributed(held) else held


def shard(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of ``whole`` if it is divided over ranks as ``like`` is; without communication."""
    if not distributed(like):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered(part: Tensor, like: Any) -> Tensor:
    """The whole tensor of which every rank has ``part``, divided as ``like`` is. Called on all of these ranks."""
    if not distributed(like):
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    spread = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )
    return spread.full_tensor()


def owners(tensor: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor is divided; none for a plain or replicated tensor.

    Raises:
        ValueError: if the ranks' parts are partial sums.
    """
    if not distributed(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a DTensor of placements {placements} holds partial sums: redistribute it first")
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether the sum of squares of each of this rank's parts is finite: then nothing is infinite or NaN.

    One pass, without a copy, a fraction of the time of ``isfinite``. Values above 1e19 count as not finite.
    """
    parts = [part for tensor in tensors if (part := local(tensor)).numel()]
    if not parts:
        return True
    norms = torch._foreach_norm(parts)  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all())


def finite_on_ranks(tensors: Collection[Tensor]) -> bool:
    """:func:`all_finite` on every rank that has a part of one of them. Called on all of these ranks."""
    bad = int(not all_finite(tensors))
    homes = dict.fromkeys((local(tensor).device, owners(tensor)) for tensor in tensors)
    return not any(int(summed(torch.tensor(bad, device=device), groups)) for device, groups in homes)


def summed(numbers: Tensor, groups: tuple[Any, ...]) -> Tensor:
    """The sum of ``numbers`` over the ranks of ``groups``, in place. Called on every one of them."""
    for group in groups:
        torch.distributed.all_reduce(numbers, group=group)
    return numbers
