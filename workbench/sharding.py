"""Networks divided among ranks by FSDP2: how they are divided, and how whole weights get in and out."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from workbench.ranks import rank, whole


def divide(network: nn.Module, mesh: Any) -> None:
    """Let the ranks of the mesh's ``data_parallel`` dimension share the weights of ``network`` by FSDP2, in place.

    Blocks, the members of every ``Sequential`` and ``ModuleList``, are gathered one at a time while training; what is
    outside of them, together. A network that is divided already stays as it is.

    Args:
        network: The network.
        mesh: A LightningModule's ``device_mesh``; None, as other strategies have it, divides nothing.

    Raises:
        ValueError: If a layer's weights are to be divided as well, by tensor parallelism, which nobody asked of it.
    """
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"the strategy divides each layer among {mesh['tensor_parallel'].size()} processes, and "
            f"{type(network).__name__} does not say how: give ModelParallelStrategy data_parallel_size: "
            f"{mesh.size()} and tensor_parallel_size: 1, or divide it in configure_model of a module of your own"
        )
    if isinstance(network, FSDPModule):
        return
    several = [module for module in network.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    for block in (block for module in reversed(several) for block in module):
        own = list(block.parameters())
        if own and not isinstance(block, nn.ModuleList) and all(uses[id(parameter)] == 1 for parameter in own):
            fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def one_file(trainer: Trainer) -> None:
    """Let FSDP2's checkpoints be one file of whole tensors: a folder of parts cannot be replaced at once."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        trainer.strategy._save_distributed_checkpoint = False


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors, of which a divided module takes each rank's part, without communication."""
    own = module.state_dict()
    module.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()})


@torch.no_grad()
def whole_state(network: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, on the CPU where they were divided; empty on ranks above zero.

    Tied weights stay one tensor. Called on every rank.
    """
    state = network.state_dict(keep_vars=True)
    found: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in found:
            full = whole(value)
            found[id(value)] = None if rank() else full if full is value else full.cpu()
    return {} if rank() else {name: found[id(value)] for name, value in state.items()}


def _part(value: Tensor, like: Any) -> Tensor:
    """What of the whole tensor ``value`` this rank holds if it lies as ``like`` does."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
