"""Masks hold inside the steps of optimizers that evaluate there, and around optimizers in one another."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from prune import Pruner
from prune.masks.stepping import unwrap_optimizer
from prune.policies import Gradual
from tests.helpers.bare_loop import net

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 3


class SAM(Optimizer):
    """As it is copied from project to project: up along the gradient, then a step from where it was."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=0.5)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(Optimizer):
    """Every second step back towards slow weights, which were dense once."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.count = optimizer, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for slow, p in zip(self.slow, [p for group in self.param_groups for p in group["params"]]):
            slow.lerp_(p, 0.5)
            p.copy_(slow)


def closure_of(model: nn.Module, seen: list[Any], masks: Any) -> Any:
    def closure() -> Any:
        model.zero_grad()
        seen.append(masks.is_applied_to(model))
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_searches_among_sparse_networks(line_search: str | None) -> None:
    """Also with directions from before the pruning in its memory."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=line_search)
    masks, seen = Pruner()(model, 0.3), []
    optimizer.step(closure_of(model, [], masks))
    masks = Pruner()(model, 0.3)
    masks.apply(model)
    losses = []
    with masks.keep(optimizer, model):
        for _ in range(4):
            optimizer.step(closure_of(model, seen, masks))
            losses.append(nn.functional.cross_entropy(model(X), Y).item())
    assert all(seen)
    assert len(seen) > 8
    assert masks.is_applied_to(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("by_closure", [False, True])
def test_sam_is_masked_however_it_is_called(by_closure: bool) -> None:
    model = net()
    optimizer, masks, seen = SAM(model.parameters()), Pruner()(model, 0.3), []
    masks.apply(model)
    closure = closure_of(model, seen, masks)
    with masks.keep(optimizer, model):
        for _ in range(3):
            closure()
            if by_closure:
                optimizer.step(closure)
            else:
                optimizer.first_step()
                nn.functional.cross_entropy(model(X), Y).backward()
                optimizer.second_step()
            assert masks.is_applied_to(model)
    assert all(seen)
    assert unwrap_optimizer(optimizer) is optimizer.base_optimizer
    masks.clear_state(optimizer, model)
    momentum = optimizer.base_optimizer.state[model[0].weight]["momentum_buffer"]
    assert not momentum[~masks["0.weight"]].any()


def test_a_policy_counts_the_steps_inside() -> None:
    model = net()
    optimizer, policy = SAM(model.parameters()), Gradual(0.3, "0it", "3it", "1it")
    with policy.follow(model, optimizer):
        for _ in range(4):
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step(lambda: nn.functional.cross_entropy(model(X), Y).backward())
    assert policy.state_dict()["updates"] == 4
    assert policy.masks is not None
    assert policy.masks.is_applied_to(model)


def test_weights_that_an_outer_optimizer_moves_are_masked() -> None:
    model = net()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1))
    masks = Pruner()(model, 0.3)
    masks.apply(model)
    with masks.keep(optimizer, model):
        for _ in range(3):
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
            assert masks.is_applied_to(model)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *itertools.product(["SGD", "Adam", "AdamW", "NAdam"], [{"foreach": True}, {"foreach": False}]),
        *itertools.product(["SGD", "Adam", "AdamW"], [{"fused": True}]),
    ],
)
def test_other_optimizers_of_torch_take_a_closure_as_it_is(kind: str, how: dict[str, bool]) -> None:
    models = [net(), net()]
    masks = Pruner()(models[0], 0.3)
    for model, by_closure in zip(models, (True, False)):
        masks.apply(model)
        optimizer: Any = getattr(torch.optim, kind)(model.parameters(), lr=0.01, weight_decay=0.1, **how)
        closure = closure_of(model, [], masks)
        with masks.keep(optimizer, model):
            for _ in range(3):
                optimizer.step(closure) if by_closure else (closure(), optimizer.step())
        assert masks.is_applied_to(model)
    assert all(torch.equal(one, two) for one, two in zip(*(model.parameters() for model in models)))


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="Linear is not an optimizer"):
        unwrap_optimizer(nn.Linear(1, 1))
