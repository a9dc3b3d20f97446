"""Models, masks and optimizers for tests of masked training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from prune.masks import Masks

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
    "sgd-fused": lambda ps: SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "amsgrad": lambda ps: Adam(ps, lr=0.01, amsgrad=True, foreach=False),
    "adamw-fused": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1, fused=True),
}


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3))


def half(model: nn.Module, seed: int = 0) -> Masks:
    """About half of every weight matrix."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in weights.items()})


def largest_masked(masks: Masks, model: nn.Module) -> float:
    return max(model.get_parameter(n)[~mask].abs().max().item() for n, mask in masks.items())


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(8, 6, generator=generator).to(dtype)
    loss = nn.functional.cross_entropy(model(inputs).float(), torch.arange(8) % 3)
    loss.backward()
    return loss


class Tied(nn.Module):
    """One weight under four names: the same object, another Parameter in its memory, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3, bias=False)
        self.same = nn.Linear(4, 3, bias=False)
        self.view = nn.Linear(4, 3, bias=False)
        self.back = nn.Linear(3, 4, bias=False)
        self.same.weight = self.first.weight
        self.view.weight = nn.Parameter(self.first.weight.data)
        self.back.weight = nn.Parameter(self.first.weight.data.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.back(self.same(x) + self.first(x)))
