import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from workbench.models.copying import copied


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.seen["layer"] = self.layer(x)
        return self.last


def called(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "weight_norm": lambda: weight_norm(nn.Linear(4, 4)),
        "spectral_norm": lambda: spectral_norm(nn.Linear(4, 4)),
        "prune": lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
        "parametrized": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "remembers": Remembers,
        "lstm": lambda: weight_norm(nn.LSTM(4, 4), "weight_hh_l0"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm of old says that it is
        network = nn.Sequential(made[name]())
    network(torch.ones(2, 4))
    return network


def output(network: nn.Module) -> Tensor:
    result = network(torch.ones(2, 4))
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "prune", "parametrized", "remembers", "lstm"])
def test_a_network_is_copied_after_a_call(name: str) -> None:
    network = called(name).eval()
    copy_of_it = copied(network)
    with torch.no_grad():
        before = output(network)
    assert torch.equal(output(copy_of_it), before)
    output(copy_of_it).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        for parameter in copy_of_it.parameters():
            parameter.zero_()
        assert torch.equal(output(network), before), "they share no memory"


def test_copy_itself_refuses_it() -> None:
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(called("weight_norm"))
