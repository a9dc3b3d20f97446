"""Networks sharded over ranks by FSDP2: sharding, and full state dicts in and out."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.distributed.ranks import full_tensor, rank


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard the weights of ``network`` over the mesh's ``data_parallel`` dimension by FSDP2, in place.

    Blocks, the members of every ``Sequential`` and ``ModuleList``, are gathered one at a time while training; weights
    outside of blocks, or shared between them, together. A network that is already sharded stays as it is.

    Args:
        network: The network.
        mesh: A LightningModule's ``device_mesh``; None, as with other strategies, shards nothing.

    Raises:
        ValueError: As :func:`check_mesh`.
    """
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    check_mesh(mesh)
    if isinstance(network, FSDPModule):
        return
    containers = [module for module in network.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    shared = {parameter for parameter, count in uses.items() if count > 1}
    # Inner blocks first: fully_shard leaves out parameters that a submodule has sharded.
    for block in (block for container in reversed(containers) for block in container):
        own = list(block.parameters())
        if own and not isinstance(block, nn.ModuleList) and not any(id(parameter) in shared for parameter in own):
            fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def check_mesh(mesh: Any) -> None:
    """Refuse tensor parallelism, the strategy's default within a machine: here every process has its own batches.

    Raises:
        ValueError: If the mesh has a ``tensor_parallel`` dimension of more than one process.
    """
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}, where processes see the "
            f"same batches: give it data_parallel_size: {mesh.size()} and tensor_parallel_size: 1"
        )


def use_full_checkpoints(trainer: Trainer) -> None:
    """Make FSDP2 write each checkpoint as one file of full tensors, as other strategies do.

    One file can be replaced atomically and does not depend on the number of ranks. Parts of the strategy are
    replaced, because Lightning 2.6 fails to read such a file if an optimizer has no state yet, and because torch 2.13
    lets an optimizer take an empty step before it returns the state, which Adam counts.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return

    def load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only, mmap=True)
        load_full_state_dict(trainer.lightning_module, checkpoint["state_dict"])
        for optimizer, state in zip(strategy.optimizers, checkpoint["optimizer_states"]):
            load_full_optimizer_state(optimizer, state)
        return checkpoint

    # Private: the constructor argument save_distributed_checkpoint, but on the user's strategy.
    strategy._save_distributed_checkpoint = False
    strategy.lightning_module_state_dict = lambda: full_state_dict(trainer.lightning_module)
    strategy.optimizer_state = full_optimizer_state
    strategy.load_checkpoint = load


def reshard(module: nn.Module) -> None:
    """Free weights gathered for the last forward pass: parameters are each rank's shards again."""
    for each in module.modules():
        if hasattr(each, "unshard"):
            each.reshard()  # type: ignore[operator]


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of full tensors; of a sharded module every rank takes its shard, without communication."""
    own, strict = module.state_dict(), getattr(module, "strict_loading", True)
    module.load_state_dict({name: _local_shard(value, own.get(name)) for name, value in state.items()}, strict=strict)


def full_state_dict(network: nn.Module) -> dict[str, Any]:
    """The state dict with full tensors, sharded ones on the CPU; empty on ranks above zero.

    Tied weights stay one tensor. Called on every rank.
    """
    gathered: dict[int, Any] = {}
    state = network.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in gathered:
            gathered[id(value)] = _gather(value)
    return {} if rank() else {name: gathered[id(value)] for name, value in state.items()}


def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state dict with full tensors; empty on ranks above zero. Called on every rank."""
    local = optimizer.state_dict()
    state = {i: {key: _gather(item) for key, item in each.items()} for i, each in local["state"].items()}
    return {} if rank() else {**local, "state": state}


def load_full_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state of :func:`full_optimizer_state`; tensors of a parameter's shape are sharded as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _local_shard(item, parameters[index])
            if key != "step" and _has_shape_of(item, parameters[index])
            else item
            for key, item in each.items()
        }
        for index, each in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _has_shape_of(item: Any, like: Tensor) -> bool:
    return isinstance(item, Tensor) and item.shape == like.shape


def _gather(value: Any) -> Any:
    """``value`` detached; if it was sharded, the full tensor on the CPU, and None on ranks above zero."""
    if not isinstance(value, Tensor):
        return value
    full = full_tensor(value.detach())
    return full if not hasattr(value, "device_mesh") else None if rank() else full.cpu()


def _local_shard(value: Tensor, like: Any) -> Tensor:
    """This rank's shard of the full tensor ``value``, placed as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
