"""Weights, gradients and optimizer state that are set to zero; what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.testing._internal.two_tensor import TwoTensor

from prune.masks import Masks
from tests.helpers.masked_models import OPTIMIZERS, Tied, backward, half, mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_leaves_positive_zeros_and_nothing_else_changes(dtype: torch.dtype):
    model = mlp().to(dtype)
    masks = half(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model[0].weight.data[~masks["0.weight"]] = torch.tensor(-1.0, dtype=dtype)
    for position, bad in zip((~masks["2.weight"]).nonzero(), (math.nan, math.inf, -math.inf, -0.0)):
        model[2].weight.data[tuple(position)] = bad
    masks.apply(model)
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name in masks:
            assert not parameter[~masks[name]].signbit().any()
            expected = torch.where(masks[name], expected, 0)
        assert torch.equal(parameter, expected)


def test_apply_follows_names_given_to_shared_weights():
    model = Tied()
    Masks({"same.weight": torch.eye(3, 4, dtype=torch.bool)}).apply(model)
    assert torch.equal(model.first.weight != 0, torch.eye(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("act", ["apply", "mask_gradients", "model_density", "keep", "clear_state"])
def test_masks_of_another_model_are_refused(act: str):
    model = mlp()
    optimizer = SGD(model.parameters())
    foreign = Masks({"0.weigth": torch.ones(10, 6, dtype=torch.bool)})
    short = Masks({"0.weight": torch.ones(9, 6, dtype=torch.bool)})

    def call(masks: Masks) -> None:
        arguments = (optimizer, model) if act in ("keep", "clear_state") else (model,)
        getattr(masks, act)(*arguments)

    with pytest.raises(ValueError, match=r"'0\.weigth'.*; did you mean '0\.weight'\?"):
        call(foreign)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(9, 6\), the parameter \(10, 6\)"):
        call(short)


def test_what_cannot_be_masked_is_refused():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    sparse, whole, wrapped = nn.Module(), nn.Module(), nn.Module()
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    wrapped.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    cases = [
        (empty, "'weight' cannot be masked, it is on the meta device, without values: materialise it first"),
        (sparse, r"'weight' cannot be masked, it is stored as torch\.sparse_coo: make it dense first"),
        (whole, r"'weight' cannot be masked, it is of type torch\.int8: dequantise it first"),
        (wrapped, "'weight' cannot be masked, it is a TwoTensor, which has no plain values: dequantise it first"),
    ]
    masks = Masks({"weight": mask})
    optimizer = SGD([nn.Parameter(torch.ones(1))])
    for model, message in cases:
        for act in (masks.apply, masks.mask_gradients, lambda m: masks.keep(optimizer, m)):
            with pytest.raises(ValueError, match=message):
                act(model)
        with pytest.raises(ValueError, match=message):
            masks.clear_state(optimizer, model)
        assert not masks.is_applied_to(model)
        assert masks.model_density(model) == 1
    embedding = nn.Embedding(2, 2, sparse=True)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 'weight' cannot be masked, it is stored as torch\.sparse"):
        masks.mask_gradients(embedding)


def test_mask_gradients_before_clipping():
    """Pitfall 1: the norm counts live weights only."""
    model = mlp()
    masks = half(model)
    masks.apply(model)
    backward(model)
    assert model[0].weight.grad is not None
    assert model[2].weight.grad is not None
    gradients = {n: p.grad for n, p in model.named_parameters()}
    live = [g[masks[n]] if n in masks else g for n, g in gradients.items() if g is not None]
    expected = torch.cat([g.flatten() for g in live]).norm()
    unmasked = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model[0].weight.grad[~masks["0.weight"]] = math.inf
    model[2].bias.grad = model[2].bias.grad  # without a mask: left alone
    masks.mask_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, expected)
    assert norm < unmasked
    model.zero_grad()
    masks.mask_gradients(model)  # without gradients there is nothing to do


def test_weights_tied_by_memory_are_one_weight():
    """Pitfall 6: every gradient and every state of the one weight is masked, transposed where it is."""
    model = Tied()
    mask = torch.eye(3, 4, dtype=torch.bool)
    masks = Masks({"first.weight": mask})
    masks.apply(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.keep(optimizer, model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        masks.mask_gradients(model)
        for layer, live in ((model.first, mask), (model.view, mask), (model.back, mask.t())):
            assert layer.weight.grad is not None
            assert torch.equal(layer.weight.grad != 0, live)
        optimizer.step()
        assert torch.equal(model.first.weight != 0, mask)
    for layer, live in ((model.first, mask), (model.view, mask), (model.back, mask.t())):
        buffer = optimizer.state[layer.weight]["momentum_buffer"].fill_(1)
        masks.clear_state(optimizer, model)
        assert torch.equal(buffer, live.float())
    only_the_alias = SGD([model.back.weight])
    masks.keep(only_the_alias, model).remove()


def test_a_weight_that_shares_part_of_a_masked_one_is_refused():
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[0].weight.data[:3])
    masks = Masks({"0.weight": torch.ones(6, 4, dtype=torch.bool)})
    model[1].weight.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="shares only part of the memory"):
        masks.mask_gradients(model)


def test_clear_state_of_newly_masked_weights():
    """Pitfall 1: what the optimizer remembers of a weight that was just masked is gone, the rest is not."""
    model = mlp()
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    for optimizer, keys in (
        (OPTIMIZERS["adamw"](model.parameters()), ("exp_avg", "exp_avg_sq")),
        (OPTIMIZERS["sgd"](model.parameters()), ("momentum_buffer",)),
    ):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict()["state"])
        masks = Masks({"scale": torch.tensor(False), "2.weight": half(model)["2.weight"]})
        masks.clear_state(optimizer, model)
        for i, (name, parameter) in enumerate(model.named_parameters()):
            state = optimizer.state[parameter]
            for key in keys:
                mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
                assert torch.equal(state[key], before[i][key] * mask)
                assert bool(before[i][key].all())
            assert state.get("step") == before[i].get("step")


def test_clear_state_before_any_step_and_for_lbfgs():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    half(model).clear_state(optimizer, model)
    assert not optimizer.state

    def closure() -> float:
        optimizer.zero_grad()
        return backward(model).item()

    optimizer.step(closure)
    before = copy.deepcopy(optimizer.state_dict()["state"][0]["d"])
    half(model).clear_state(optimizer, model)
    assert torch.equal(optimizer.state_dict()["state"][0]["d"], before)
