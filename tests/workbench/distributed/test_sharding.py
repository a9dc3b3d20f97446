"""Networks divided by FSDP2 on two ranks: whole weights come out as one process has them, and go in again."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.helpers.ranks import on_ranks
from workbench import TaskModule
from workbench.checkpoints import compact
from workbench.distributed.ranks import check_ranks_agree, digest, rank
from workbench.distributed.sharding import (
    check_mesh,
    full_optimizer_state,
    full_state_dict,
    load_full_optimizer_state,
    load_full_state_dict,
    reshard,
    shard,
)
from workbench.models import MLP
from workbench.tasks import Classification
from workbench.training.save import size_of


class Tied(nn.Module):
    """Blocks in a list, weights at the root, one of them under two names, and one shared by two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])
        self.blocks[2][0].bias = self.blocks[1][0].bias
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def trained(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        inputs = torch.arange(6).reshape(2, 3) + step % 2
        network(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(optimizer: Callable[..., Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = Tied()
    return network, optimizer(network.parameters())


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) else one == other


def near(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def divided(folder: Path) -> list[str]:
    """Everything that is asked of a divided network, on one of two ranks; what failed."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    checks: dict[str, bool] = {}
    for optimizer in (adam, plain):
        network, _ = made(optimizer)
        shard(network, mesh)
        shard(network, mesh)
        own = optimizer(network.parameters())
        single, alone = made(optimizer)
        checks["blocks"] = [isinstance(block, FSDPModule) for block in network.blocks] == [True, False, False]  # type: ignore[union-attr]
        checks["divided"] = all(isinstance(parameter, DTensor) for parameter in network.parameters())
        checks[f"no state, {optimizer.__name__}"] = full_optimizer_state(own).get("state", {}) == {} and not own.state
        trained(network, own)
        trained(single, alone)
        with torch.no_grad():
            network(torch.zeros(1, 1, dtype=torch.int64))
        reshard(network)
        checks["released"] = all(isinstance(parameter, DTensor) for parameter in network.parameters())
        state, moments = full_state_dict(network), full_optimizer_state(own)
        if rank() == 0:
            checks["tied"] = state["embed.weight"] is state["head.weight"]
            checks[f"as one process, {optimizer.__name__}"] = near(state, single.state_dict())
            checks[f"its moments, {optimizer.__name__}"] = (
                moments["state"].keys() == alone.state_dict()["state"].keys()
                and all(near(a, b) for a, b in zip(moments["state"].values(), alone.state_dict()["state"].values()))
            )  # fmt: skip
            torch.save((state, moments), folder / "whole.pt")
        else:
            checks["nothing"] = (state, moments) == ({}, {})
        torch.distributed.barrier()
        state, moments = torch.load(folder / "whole.pt")
        again, _ = made(optimizer)
        shard(again, mesh)
        fresh = optimizer(again.parameters())
        load_full_state_dict(again, state)
        load_full_optimizer_state(fresh, moments)
        trained(network, own)
        trained(again, fresh)
        checks[f"goes on, {optimizer.__name__}"] = digest(again.state_dict()) == digest(network.state_dict())
        check_ranks_agree(again)
        reshard(network)
        state, counts = full_state_dict(network), size_of(network, None, folder)
        if rank() == 0:
            compact.save(network, folder / "compact", state=state)
            back = compact.load(folder / "compact")
            checks["loads"] = type(back) is Tied and equal(back.state_dict(), state)
            checks["counted"] = counts["nonzero"] == size_of(back, None, folder)["nonzero"]
    torch.distributed.barrier()
    try:
        check_mesh(init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel")))
    except ValueError as error:
        checks["sharing a batch"] = "data_parallel_size: 2 and tensor_parallel_size: 1" in str(error)
    return [name for name, fine in checks.items() if not fine]


def test_whole_weights_come_out_and_go_in(tmp_path: Path) -> None:
    assert on_ranks(divided, tmp_path) == [[], []]


def test_without_a_mesh_nothing_is_divided() -> None:
    network = MLP(4, [3], 2)
    shard(network, None)
    check_mesh(None)
    reshard(network)
    assert type(network) is MLP
    state = full_state_dict(network)
    assert equal(state, dict(network.state_dict()))
    assert not any(value.requires_grad for value in state.values())
    load_full_state_dict(network, {name: value + 1 for name, value in state.items()})
    assert not equal(network.state_dict(), {name: value * 0 for name, value in state.items()})


def test_what_is_trained_beside_the_network_is_refused() -> None:
    module = TaskModule(MLP(4, [3], 2), Classification(2))
    module.projector = nn.Linear(2, 2)
    module.configure_model()
    module._device_mesh = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'projector.weight' is trained outside the network.*strategy: ddp"):
        module.configure_model()
