"""Weights that stay masked while optimizers step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from prune.masks import Masks
from tests.helpers.masked_models import OPTIMIZERS, backward, half, largest_masked, mlp


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bare_loop_stays_masked_after_every_step(name: str, accumulation: int):
    """Pitfall 1, and "Keeping weights masked, any loop": pruned mid-training, with momentum built up."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    keys = list(model.state_dict())

    def train(steps: int, after: Callable[[], None]) -> None:
        for step in range(steps):
            for piece in range(accumulation):
                backward(model, seed=step * accumulation + piece)
            optimizer.step()
            optimizer.zero_grad()
            after()

    train(3, lambda: None)
    masks = half(model)
    masks.apply(model)
    kept = {n: model.get_parameter(n)[masks[n]].clone() for n in masks}
    leaks: list[float] = []
    with masks.keep(optimizer, model):
        train(5, lambda: leaks.append(largest_masked(masks, model)))
    assert leaks == [0.0] * 5
    assert all(not torch.equal(model.get_parameter(n)[masks[n]], kept[n]) for n in masks)
    assert list(model.state_dict()) == keys
    train(1, lambda: None)
    assert largest_masked(masks, model) > 0  # once the handle is gone, the same loop leaks


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_masking_gradients_alone_leaks(name: str):
    """Why `keep` exists: momentum and weight decay move a weight that has no gradient."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    backward(model)
    optimizer.step()
    masks = half(model)
    masks.apply(model)
    optimizer.zero_grad()
    backward(model)
    masks.mask_gradients(model)
    optimizer.step()
    assert largest_masked(masks, model) > 1e-3


def test_lbfgs_with_a_closure():
    model = mlp()
    masks = half(model)
    masks.apply(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> float:
        optimizer.zero_grad()
        return backward(model).item()

    masks.keep(optimizer, model)
    losses = [optimizer.step(closure) for _ in range(3)]
    assert largest_masked(masks, model) == 0
    assert losses[-1] < losses[0]


def sparse_training(name: str) -> tuple[nn.Sequential, Masks, torch.optim.Optimizer]:
    """A network that holds its masks, and its optimizer, which keeps them."""
    model = mlp()
    masks = half(model)
    masks.apply(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    masks.keep(optimizer, model)
    return model, masks, optimizer


def test_a_skipped_step_of_a_gradient_scaler():
    model, masks, optimizer = sparse_training("sgd")
    scaler = torch.amp.GradScaler("cpu")
    before = model[0].weight.detach().clone()
    for bad in (True, False):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.ones(2, 6)), torch.ones(2, 3))
        scaler.scale(loss * math.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == bad
        assert largest_masked(masks, model) == 0


def test_several_optimizers_and_parameter_groups():
    model = mlp()
    masks = half(model)
    masks.apply(model)
    first = SGD([{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": 0.2}])
    second = AdamW(model[2].parameters(), lr=0.1)
    handle = masks.keep([first, second], model)
    for _ in range(3):
        backward(model)
        first.step()
        assert largest_masked(masks, model) == 0
        second.step()
        assert largest_masked(masks, model) == 0
    handle.remove()
    handle.remove()
    assert not first._optimizer_step_post_hooks
    assert not second._optimizer_step_post_hooks


def test_parameters_that_come_later():
    """A group added to the optimizer, a layer unfrozen, a parameter replaced: looked up at every step."""
    model = mlp()
    masks = half(model)
    masks.apply(model)
    model[2].requires_grad_(False)
    optimizer = SGD(model[0].parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    masks.keep(optimizer, model)

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            assert largest_masked(masks, model) == 0

    train()
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    before = model[2].weight.detach().clone()
    train()
    assert not torch.equal(model[2].weight, before)
    model[0].weight = nn.Parameter(torch.ones(10, 6))
    optimizer.add_param_group({"params": [model[0].weight]})
    backward(model)
    optimizer.step()
    assert largest_masked(masks, model) == 0
    assert bool(model[0].weight[masks["0.weight"]].all())


def test_an_optimizer_that_is_restored_keeps_its_hook():
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    masks = half(model)
    masks.apply(model)
    masks.keep(optimizer, model)
    optimizer.load_state_dict(saved)
    assert all(state["exp_avg"].any() for state in optimizer.state.values())
    optimizer.step()
    assert largest_masked(masks, model) == 0
    assert not any("mask" in key for key in optimizer.state_dict())


def test_a_mask_of_ones_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []
    monkeypatch.setattr(torch, "_foreach_mul_", lambda weights, factors: counts.append(len(weights)))
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    masks = Masks.ones(model)
    with masks.keep(optimizer, model):
        optimizer.step()
    with Masks({**masks, "0.weight": half(model)["0.weight"]}).keep(optimizer, model):
        optimizer.step()
    assert counts == [1]


def test_the_product_has_the_layout_of_the_weights(monkeypatch: pytest.MonkeyPatch):
    """Another layout of the mask would make it slow."""
    strides: list[Any] = []
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda weights, factors: strides.extend((weights[0].stride(), factors[0].stride()))
    )
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    masks = half(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    masks.keep(optimizer, model)
    optimizer.step()
    assert strides == [(27, 1, 9, 3)] * 2


def test_under_autocast_the_weights_themselves_are_masked():
    """Pitfall 11."""
    model, masks, optimizer = sparse_training("adamw-fused")
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            backward(model)
            optimizer.step()
        optimizer.zero_grad()
        assert largest_masked(masks, model) == 0
        assert model[0].weight.dtype == torch.float32


def test_an_optimizer_of_something_else_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="holds none of the masked weights"):
        half(model).keep(SGD(mlp().parameters()), model)
    with pytest.raises(ValueError, match="holds none of the masked weights"):
        half(model).keep([], model)
    for wrong in (model, None, [SGD(model.parameters()), 3]):
        with pytest.raises(TypeError, match="is not an optimizer"):
            half(model).keep(wrong, model)


class Accelerated(Optimizer):
    """As accelerate's: is an Optimizer itself, without the state of one, around the real one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.optimizer.step(closure)


class Outer:
    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers():
    model = mlp()
    masks = half(model)
    inner = OPTIMIZERS["sgd"](model.parameters())
    wrapped = Accelerated(inner)
    with masks.keep(Outer(wrapped), model):
        backward(model)
        wrapped.step()
        assert largest_masked(masks, model) == 0
    masks.clear_state(Outer(wrapped), model)
    assert not inner.state[model[0].weight]["momentum_buffer"][~masks["0.weight"]].any()


def test_lightnings_optimizer():
    module = pytest.importorskip("lightning.pytorch.core.optimizer")
    model = mlp()
    masks = half(model)
    wrapped = module.LightningOptimizer(OPTIMIZERS["sgd"](model.parameters()))
    with masks.keep(wrapped, model):
        backward(model)
        wrapped.optimizer.step()
        assert largest_masked(masks, model) == 0


def test_hooks_vanish_after_an_exception():
    model = mlp()
    optimizer = SGD(model.parameters())
    hooks_inside = []

    def interrupted() -> None:
        with half(model).keep(optimizer, model):
            hooks_inside.append(len(optimizer._optimizer_step_post_hooks))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks_inside == [1]
    assert not optimizer._optimizer_step_post_hooks


def test_masks_follow_the_weights_to_another_dtype(monkeypatch: pytest.MonkeyPatch):
    """And are integers of the weights' size every time, which makes the product cheap."""
    used: list[torch.dtype] = []
    multiply = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

    def spy(weights: list[Tensor], factors: list[Tensor]) -> None:
        used.extend(factor.dtype for factor in factors)
        multiply(weights, factors)

    monkeypatch.setattr(torch, "_foreach_mul_", spy)
    model = mlp()
    masks = half(model)
    masks.apply(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    masks.keep(optimizer, model)
    sizes = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
    for dtype, integers in sizes.items():
        model.to(dtype)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert model[0].weight.dtype == dtype
        assert used[-2:] == [integers] * 2
        assert largest_masked(masks, model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_whatever_a_step_leaves_there_is_zero(dtype: torch.dtype):
    """Also NaN, the gradient of sqrt|w| at 0, which no product with 0 makes 0; other weights keep their bits."""
    model = nn.ParameterDict({"w": torch.ones(7, dtype=dtype), "channels_last": torch.ones(2, 3, 2, 2, dtype=dtype)})
    model["channels_last"].data = model["channels_last"].data.to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.5)
    mask = torch.tensor([False] * 5 + [True] * 2)
    Masks({"w": mask, "channels_last": torch.zeros(2, 3, 2, 2, dtype=torch.bool)}).keep(optimizer, model)
    model["w"].grad = torch.tensor([math.nan, math.inf, -math.inf, 9, 0, math.nan, 1], dtype=dtype)
    model["channels_last"].grad = torch.full_like(model["channels_last"], math.nan)
    optimizer.step()
    dead = torch.cat([model["w"][:5], model["channels_last"].flatten()]).detach()
    assert torch.equal(dead.view(torch.uint8), torch.zeros_like(dead).view(torch.uint8))
    assert model["w"][5].isnan()
    assert model["w"][6] == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_follow_the_weights_to_another_device():
    model = mlp()
    masks = half(model)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    masks.keep(optimizer, model)
    model.cuda()
    masks.apply(model)
    assert model[0].weight.is_cuda
    assert largest_masked(masks, model) == 0
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6, device="cuda")).square().sum().backward()
        masks.mask_gradients(model)
        optimizer.step()
        assert largest_masked(masks, model) == 0
    masks.clear_state(optimizer, model)
    moved = masks.to("cuda")
    assert moved["0.weight"].is_cuda
    assert moved == masks
    assert moved.hash() == masks.hash()
    assert (moved & masks).overlap(masks).jaccard == 1


def test_copies_and_a_second_fit():
    """Pitfall 10: no extra keys; deepcopy and another optimizer work; the copy is not hooked."""
    model = mlp()
    masks = half(model)
    masks.apply(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    handle = masks.keep(optimizer, model)
    backward(model)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
    assert list(twin.state_dict()) == list(mlp().state_dict())
    assert not twin_optimizer._optimizer_step_post_hooks
    assert largest_masked(masks, twin) == 0
    handle.remove()
    second = OPTIMIZERS["sgd"](twin.parameters())
    with masks.keep(second, twin):
        for _ in range(3):
            backward(twin)
            second.step()
            assert largest_masked(masks, twin) == 0
    fresh = mlp(1)
    fresh.load_state_dict(twin.state_dict())
    assert largest_masked(masks, fresh) == 0


def test_a_kept_weight_may_be_zero():
    """Pitfall 2: masks are never inferred from zeros."""
    model = mlp()
    nn.init.zeros_(model[0].weight)
    masks = Masks.ones({"0.weight": model[0].weight})
    assert masks.density == 1
    optimizer = SGD(model.parameters(), lr=0.1)
    masks.keep(optimizer, model)
    backward(model)
    optimizer.step()
    assert bool((model[0].weight != 0).all())
