"""Networks divided among ranks by FSDP2: how they are divided, and how whole weights get in and out."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.distributed.ranks import rank, whole


def divide(network: nn.Module, mesh: Any) -> None:
    """Let the ranks of the mesh's ``data_parallel`` dimension share the weights of ``network`` by FSDP2, in place.

    Blocks, the members of every ``Sequential`` and ``ModuleList``, are gathered one at a time while training; what is
    outside of them, or shared, together. A network that is divided already stays as it is.

    Args:
        network: The network.
        mesh: A LightningModule's ``device_mesh``; None, as other strategies have it, divides nothing.

    Raises:
        ValueError: As :func:`check_mesh`.
    """
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    check_mesh(mesh)
    if isinstance(network, FSDPModule):
        return
    several = [module for module in network.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    named = dict(network.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, named.values()))
    shared = {id(parameter): parameter for parameter in named.values() if uses[id(parameter)] > 1}
    for block in (block for module in reversed(several) for block in module):
        own = list(block.parameters())
        if own and not isinstance(block, nn.ModuleList) and not any(id(parameter) in shared for parameter in own):
            fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def check_mesh(mesh: Any) -> None:
    """Refuse processes that share the work on each batch, as by default all of a machine do: here each has its own.

    Raises:
        ValueError: If the mesh has a ``tensor_parallel`` dimension of more than one process.
    """
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}, where processes see the "
            f"same batches: give it data_parallel_size: {mesh.size()} and tensor_parallel_size: 1"
        )


def whole_checkpoints(trainer: Trainer) -> None:
    """Let the checkpoints of FSDP2 be one file of whole tensors each, as those of other strategies are.

    It can be replaced at once, is the same whatever the number of ranks, and can be looked into. Lightning 2.6 writes
    such files too, but reads none in which an optimizer has no state; and to ask an optimizer for its state before its
    first step, torch 2.13 makes it take one, which Adam counts.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return

    def load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only, mmap=True)
        load_whole(trainer.lightning_module, checkpoint["state_dict"])
        for optimizer, state in zip(strategy.optimizers, checkpoint["optimizer_states"]):
            load_optimizer(optimizer, state)
        return checkpoint

    strategy._save_distributed_checkpoint = False
    strategy.lightning_module_state_dict = lambda: whole_state(trainer.lightning_module)
    strategy.optimizer_state = optimizer_state
    strategy.load_checkpoint = load


def release(module: nn.Module) -> None:
    """Let go of weights that were gathered for the last forward pass, so that those seen are those of each rank."""
    for each in module.modules():
        if hasattr(each, "unshard"):
            each.reshard()  # type: ignore[operator]


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors, of which a divided module takes each rank's part, without communication."""
    own, strict = module.state_dict(), getattr(module, "strict_loading", True)
    module.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()}, strict=strict)


def whole_state(network: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, on the CPU where they were divided; empty on ranks above zero.

    Tied weights stay one tensor. Called on every rank.
    """
    found: dict[int, Any] = {}
    state = network.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in found:
            found[id(value)] = _gathered(value)
    return {} if rank() else {name: found[id(value)] for name, value in state.items()}


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors; empty on ranks above zero. Called on every rank."""
    found = optimizer.state_dict()
    state = {i: {key: _gathered(item) for key, item in each.items()} for i, each in found["state"].items()}
    return {} if rank() else {**found, "state": state}


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what :func:`optimizer_state` gave on rank zero: what has a parameter's shape is divided as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _part(item, parameters[index]) if key != "step" and _shaped(item, parameters[index]) else item
            for key, item in each.items()
        }
        for index, each in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _shaped(item: Any, like: Tensor) -> bool:
    return isinstance(item, Tensor) and item.shape == like.shape


def _gathered(value: Any) -> Any:
    """``value`` without its history, all of it and on the CPU if it was divided; None then on ranks above zero."""
    if not isinstance(value, Tensor):
        return value
    full = whole(value.detach())
    return full if not hasattr(value, "device_mesh") else None if rank() else full.cpu()


def _part(value: Tensor, like: Any) -> Tensor:
    """What of the whole tensor ``value`` this rank holds if it lies as ``like`` does."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
