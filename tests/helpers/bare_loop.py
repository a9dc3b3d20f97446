"""A training loop without a framework."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
TOTAL = 6 * 10 + 10 * 3  # prunable weights of `net`


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3))


def grads(model: nn.Module, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    x, y = torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: Any, start: int, stop: int, before: Callable[[], Any] = lambda: None) -> None:
    for index in range(start, stop):
        grads(model, index)
        before()
        optimizer.step()


def alive(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for name, parameter in model.named_parameters() if "weight" in name)


def values(model: nn.Module) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in model.parameters()]
