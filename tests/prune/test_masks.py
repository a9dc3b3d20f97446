import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from prune.masks import Masks, nearest, pack, shared_memory, unpack


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


# Validated data


def test_what_is_refused():
    good = torch.ones(2, dtype=torch.bool)
    cases = [
        ({}, "no masks given"),
        ({"": good}, "mask name ''"),
        ({3: good}, "mask name 3"),
        ({"w": torch.ones(2)}, r"'w' is torch\.float32"),
        ({"w": [True]}, "'w' is list"),
        ({"v": good, "w": good[:0]}, r"'w' of shape \(0,\) has no entries"),
    ]
    for masks, message in cases:
        with pytest.raises(ValueError, match=message):
            Masks(masks)  # pyright: ignore[reportArgumentType]


def test_masks_are_copied_in_and_keep_their_order():
    given_ = {"b": torch.tensor([True, False]), "a": torch.tensor([[True]])}
    masks = Masks(given_)
    given_["b"].zero_()
    assert masks["b"].tolist() == [True, False]
    assert list(masks) == ["b", "a"]
    assert "3 weights" in repr(masks)
    with pytest.raises(TypeError):
        hash(masks)


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


def test_ones_of_a_model_names_shared_memory_once():
    """Pitfall 6: keyed by storage."""
    assert list(Masks.ones(Tied())) == ["first.weight"]
    model = mlp()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(Masks.ones(model)) == list(Masks.ones(model.named_parameters())) == names
    assert list(Masks.ones({"w": model[0].weight})) == ["w"]
    assert Masks.ones(model).density == 1


def test_neighbours_in_one_buffer_are_not_shared():
    model = nn.Module()
    buffer = torch.zeros(10)
    model.a, model.b = nn.Parameter(buffer[1:4]), nn.Parameter(buffer[4:])
    model.empty, model.other = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    assert [[n for n, _ in g] for g in shared_memory(model)] == [["a"], ["b"], ["empty"], ["other"]]
    model.whole = nn.Parameter(buffer)
    assert [[n for n, _ in g] for g in shared_memory(model)] == [["a", "b", "whole"], ["empty"], ["other"]]


def test_on_the_meta_device_only_the_same_object_is_shared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.append(model[0])
    groups = [[n for n, _ in g] for g in shared_memory(model)]
    assert groups == [["0.weight", "2.weight"], ["0.bias", "2.bias"], ["1.weight"], ["1.bias"]]


# Numbers


def test_the_denominators_by_name():
    """Pitfall 8."""
    model = mlp()
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[:3] = True
    masks = Masks({"0.weight": mask, "2.weight": torch.ones(3, 10, dtype=torch.bool)})
    assert masks.counts() == {"0.weight": (18, 60), "2.weight": (30, 30)}
    assert masks.density == masks.prunable_density == 48 / 90
    assert masks.model_density(model) == (48 + 13) / (90 + 13)


def test_model_density_counts_shared_weights_once():
    masks = Masks({"first.weight": torch.eye(3, 4, dtype=torch.bool)})
    assert masks.model_density(Tied()) == 3 / 12
    with pytest.raises(ValueError, match="name no parameter"):
        masks.model_density(mlp())


# Applying


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

    with pytest.raises(ValueError, match=r"'0\.weigth'. Nearest to '0\.weigth': '0\.weight'"):
        call(foreign)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(9, 6\), the parameter \(10, 6\)"):
        call(short)


# Keeping

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1, fused=True),
}


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


def test_a_skipped_step_of_a_gradient_scaler():
    model = mlp()
    masks = half(model)
    masks.apply(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks.keep(optimizer, model)
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
    """And are in the weights' own dtype every time, which makes the product cheap."""
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
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert model[0].weight.dtype == dtype
        assert used[-2:] == [dtype] * 2
        assert largest_masked(masks, model) == 0


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
    assert (moved & masks).overlap(masks) == 1


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


# Gradients and optimizer state


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


# Algebra

bits = st.lists(st.booleans(), min_size=17, max_size=17)


def of(values: list[bool]) -> Masks:
    whole = torch.tensor(values)
    return Masks({"a": whole[:12].view(3, 4), "b": whole[12:]})


def positions(masks: Masks) -> set[tuple[str, int]]:
    return {(n, i) for n, mask in masks.items() for i, on in enumerate(mask.flatten().tolist()) if on}


@settings(deadline=None)
@given(bits, bits)
def test_algebra_is_that_of_sets(a: list[bool], b: list[bool]):
    one, two = of(a), of(b)
    x, y = positions(one), positions(two)
    assert positions(one & two) == x & y
    assert positions(one | two) == x | y
    assert one.is_subset(two) == (x <= y)
    assert one.overlap(two) == (len(x & y) / len(x | y) if x | y else 1.0)
    assert (one == two) == (x == y) == (one.hash() == two.hash())


def test_different_masks_cannot_be_combined():
    one = of([True] * 17)
    fewer = Masks({"a": one["a"]})
    flat = Masks({"a": one["a"].flatten(), "b": one["b"]})
    for act in (Masks.__and__, Masks.__or__, Masks.is_subset, Masks.overlap):
        with pytest.raises(ValueError, match="different parameters, such as 'b'"):
            act(one, fewer)
        with pytest.raises(ValueError, match=r"'a' has shape \(3, 4\) here and \(12,\) there"):
            act(one, flat)
    assert one != fewer
    assert one != flat
    assert one != 1


def test_hash_and_equality_ignore_order_but_nothing_else():
    a, b = torch.tensor([True, False]), torch.tensor([[False]])
    masks = Masks({"a": a, "b": b})
    assert masks == Masks({"b": b, "a": a})
    assert masks.hash() == Masks({"b": b, "a": a}).hash() == masks.to("cpu").hash()
    others = [{"a": ~a, "b": b}, {"a": a, "c": b}, {"a": a[:, None], "b": b}, {"a": a}, {"a": b[0], "b": a}]
    hashes = {masks.hash()} | {Masks(other).hash() for other in others}
    assert len(hashes) == 6


def test_hash_is_the_same_in_another_process():
    code = "import torch; from prune.masks import Masks; print(Masks({'w': torch.arange(19) % 3 == 0}).hash())"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert there.stdout.strip() == Masks({"w": torch.arange(19) % 3 == 0}).hash()


# On disk


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_packing_is_numpys(values: list[bool]):
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack(mask)
    assert packed.numpy().tobytes() == np.packbits(mask.numpy()).tobytes()
    assert torch.equal(unpack(packed, [len(values)]), mask)


def test_packing_any_shape_and_layout():
    mask = torch.arange(30).view(5, 6).t() % 4 == 1
    assert torch.equal(unpack(pack(mask), mask.shape), mask)
    assert torch.equal(unpack(pack(torch.tensor(True)), []), torch.tensor(True))
    with pytest.raises(ValueError, match=r"give torch\.bool"):
        pack(torch.ones(3))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(3, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(1, 2, dtype=torch.uint8), "needs 2 bytes"),
        (torch.zeros(2), r"torch\.float32"),
        (torch.tensor([0, 1], dtype=torch.uint8), "padding after the 9 bits"),
    ],
)
def test_unpacking_what_does_not_fit(packed: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        unpack(packed, [3, 3])


@settings(deadline=None, max_examples=30)
@given(bits)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, values: list[bool]):
    folder = tmp_path_factory.mktemp("masks")
    masks = Masks(dict(reversed(list(of(values).items()))))
    masks.save(folder / "m.safetensors")
    loaded = Masks.load(str(folder / "m.safetensors"))
    assert loaded == masks
    assert loaded.hash() == masks.hash()
    assert list(loaded) == list(masks) == ["b", "a"]
    assert [p.name for p in folder.iterdir()] == ["m.safetensors"]


def test_one_bit_per_weight_on_disk(tmp_path: Path):
    Masks({"w": torch.ones(800, 1000, dtype=torch.bool)}).save(tmp_path / "m")
    assert 100_000 <= (tmp_path / "m").stat().st_size < 100_500


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "m"
    masks = of([True] * 17)
    masks.save(file)

    def full(*_: object) -> None:
        raise OSError("no space left")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            with pytest.raises(OSError, match="no space left"):
                of([False] * 17).save(file)
        assert Masks.load(file) == masks
        assert list(tmp_path.iterdir()) == [file]


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path):
    of([True] * 17).save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(ValueError, match="part is not a file of masks"):
            Masks.load(tmp_path / "part")


def test_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "nothing")


GOOD = {"w": torch.tensor([0b10100000], dtype=torch.uint8)}
META = {"format": "prune.masks", "version": "1", "shapes": '{"w": [3]}'}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (GOOD, None, "its format and version"),
        (GOOD, META | {"format": "pt"}, "its format and version"),
        (GOOD, META | {"version": "2"}, "its format and version"),
        (GOOD, {k: v for k, v in META.items() if k != "shapes"}, "not a file of masks"),
        (GOOD, META | {"shapes": "{"}, "not a file of masks"),
        (GOOD, META | {"shapes": "[" * 100_000}, "nested too deeply"),
        (GOOD, META | {"shapes": "[3]"}, "not lists of positive integers"),
        *(
            (GOOD, META | {"shapes": json.dumps({"w": shape})}, "not lists of positive integers")
            for shape in (3, None, [3.0], [True], [-3], [0], ["3"])
        ),
        (GOOD, META | {"shapes": '{"v": [3]}'}, "differ in 'v', 'w'"),
        (GOOD, META | {"shapes": '{"w": [3], "v": [3]}'}, "differ in 'v'"),
        (GOOD | {"v": GOOD["w"].clone()}, META, "differ in 'v'"),
        ({}, META | {"shapes": "{}"}, "no masks given"),
        (GOOD, META | {"shapes": '{"w": [9]}'}, "needs 2 bytes of U8"),
        (GOOD, META | {"shapes": '{"w": [99999999999, 99999999999]}'}, "bytes of U8"),
        ({"w": GOOD["w"][None]}, META, r"has U8 \[1, 1\]"),
        ({"w": GOOD["w"].bool()}, META, r"has BOOL \[1\]"),
        ({"w": GOOD["w"] | 1}, META, "padding after the 3 bits"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, message: str
):
    save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match=message) as caught:
        Masks.load(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_the_file_that_is_refused_above_is_otherwise_good(tmp_path: Path):
    save_file(GOOD, tmp_path / "file", META)
    assert Masks.load(tmp_path / "file")["w"].tolist() == [True, False, True]
    Masks.load(tmp_path / "file").save(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again")["w"], GOOD["w"])


def test_nearest_names():
    assert nearest("fc1.wieght", ["bias", "fc1.weight", "fc2.weight", "norm"])[0] == "fc1.weight"
    assert nearest("zzz", ["a"]) == ["a"]
