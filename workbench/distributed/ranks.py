"""The processes of one training: which of them this is, and whether they agree."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rank() -> int:
    """This process's global rank: of the process group if there is one, else as the launcher says."""
    if _grouped():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def world() -> int:
    """How many processes there are in the process group; 1 without one."""
    return torch.distributed.get_world_size() if _grouped() else 1


def check_ranks_agree(network: nn.Module) -> None:
    """Make sure that data-parallel ranks hold the same parameters, bit for bit; of divided ones, the same whole.

    Raises:
        RuntimeError: If they do not: then what rank 0 is about to save is not what was trained.
    """
    if not _grouped():
        return
    digests = everyone(digest(dict(network.named_parameters())))
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks hold different parameters after training: SHA-256 {[d[:12] for d in digests]}")


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bits of a state dict's tensors, those of DTensors as :func:`whole`."""
    found = hashlib.sha256()
    for name, value in state.items():
        if isinstance(value, Tensor):
            # A copy, as memory that numpy has seen cannot be resized any more, which FSDP2 does.
            tensor = whole(value).detach().cpu().reshape(-1).clone()
            found.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            found.update(tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def whole(tensor: Any) -> Tensor:
    """All of a tensor that ranks may have divided among them. Of a DTensor, called on every rank that has a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if _grouped():
        torch.distributed.barrier()


def check_world_size(world_size: int) -> None:
    """Refuse to run N independent trainings under a launcher that means one training of N processes.

    Raises:
        ValueError: If torchrun's or Lightning's launcher started another number of processes than ``world_size``.
    """
    if _grouped():
        launched = torch.distributed.get_world_size()
    elif "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        return  # nobody has launched anything yet; a Trainer of several devices will
    if launched != world_size:
        raise ValueError(
            f"the launcher started {launched} processes, but this stage's trainer has a world size of {world_size}: "
            f"set trainer.devices and trainer.num_nodes so that they multiply to {launched}, with strategy ddp, "
            "for every training stage"
        )


def everyone(value: Any) -> list[Any]:
    """What every rank has in place of ``value``, by rank. Called on every rank."""
    if not _grouped():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
