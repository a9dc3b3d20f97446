"""The ranks of one training: their number, gathering, and whether they agree."""

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rank() -> int:
    """This process's global rank: in the process group, else by the launcher's environment variables."""
    if _initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def world_size() -> int:
    """Number of processes in the process group; 1 without one."""
    return torch.distributed.get_world_size() if _initialized() else 1


def check_ranks_agree(network: nn.Module) -> None:
    """Check that data-parallel ranks hold the same parameters, bit for bit; of sharded ones, the same full tensors.

    Raises:
        RuntimeError: If they differ, so that rank 0 would save other weights than were trained.
    """
    if not _initialized():
        return
    digests = all_gather(digest(dict(network.named_parameters())))
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks hold different parameters after training: SHA-256 {[d[:12] for d in digests]}")


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bits of a state dict's tensors; of DTensors the full tensors'."""
    sha256 = hashlib.sha256()
    for name, value in state.items():
        if isinstance(value, Tensor):
            # A copy: FSDP2 resizes its storage, which torch forbids once numpy shares the memory.
            tensor = full_tensor(value).detach().cpu().reshape(-1).clone()
            sha256.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            sha256.update(tensor.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def full_tensor(tensor: Any) -> Tensor:
    """The full tensor of a DTensor, called on every rank of its mesh; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Imports nothing: ``torch.distributed.tensor`` takes most of a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if _initialized():
        torch.distributed.barrier()


def check_world_size(world_size: int) -> None:
    """Refuse N independent trainings under a launcher that started N processes for one training.

    Raises:
        ValueError: If torchrun's or Lightning's launcher started another number of processes than ``world_size``.
    """
    if _initialized():
        launched = torch.distributed.get_world_size()
    elif "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        return  # no launcher: a Trainer of several devices starts its own processes
    if launched != world_size:
        raise ValueError(
            f"the launcher started {launched} processes, but this stage's trainer has a world size of {world_size}: "
            f"set trainer.devices and trainer.num_nodes so that they multiply to {launched}, with strategy ddp, "
            "for every training stage"
        )


def all_gather(value: Any) -> list[Any]:
    """The ``value`` of every rank, a picklable object, by rank. Called on every rank."""
    if not _initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
