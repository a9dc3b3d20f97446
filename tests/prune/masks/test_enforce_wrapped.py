"""Masks named for a plain model, at work where it is compiled, averaged, replicated or sharded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prune.masks import Masks
from prune.masks.memory import local
from tests.helpers.ranks import on_ranks

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
}


def mlp() -> Any:
    """In double precision, so that the order of sums does not show; on two ranks no layer divides evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 1), nn.Linear(1, 3)).double()


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(1)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in weights.items()})


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double()


def train(model: nn.Module, optimizer: Optimizer, steps: range, share: slice = slice(None)) -> None:
    for step in steps:
        inputs = batch(step)[share]
        model(inputs.to(torch.promote_types(next(model.parameters()).dtype, torch.float32))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(name: str) -> dict[str, Tensor]:
    """What one process finds: dense for two steps, then masked for five."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))
    masks = half(model)
    masks.apply(model)
    masks.clear_state(optimizer, model)
    masks.keep(optimizer, model)
    train(model, optimizer, range(2, 7))
    return {n: p.detach() for n, p in model.named_parameters()}


def zero(masks: Masks, model: Any) -> bool:
    return not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


# Compiled


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_by_the_names_of_the_plain_one(whole: bool):
    model = mlp()
    masks = half(model)
    compiled: Any = torch.compile(model, backend="eager")
    if not whole:
        compiled = mlp()
        compiled[0] = torch.compile(compiled[0], backend="eager")
        model = compiled
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    masks.apply(compiled)
    assert masks.is_applied_to(compiled)
    assert masks.model_density(compiled) == masks.model_density(mlp())
    optimizer = OPTIMIZERS["sgd"](compiled.parameters())
    masks.keep(optimizer, compiled)
    train(compiled, optimizer, range(2))
    masks.mask_gradients(compiled)
    masks.clear_state(optimizer, compiled)
    assert masks.is_applied_to(compiled)
    if whole:
        assert zero(masks, model)


def test_masks_named_by_a_wrapper_fit_the_plain_model():
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager")
    masks = Masks({f"module._orig_mod.{name}": mask for name, mask in half(model).items()})
    masks.apply(model)
    assert zero(half(model), model)
    masks.apply(nn.DataParallel(compiled))


def test_an_exact_name_comes_first():
    """A layer that is called `module` is not mistaken for what a wrapper has."""
    model: Any = nn.Module()
    model.weight, model.module = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)
    nn.init.ones_(model.module.weight)
    Masks({"weight": torch.eye(2, dtype=torch.bool)}).apply(model)
    assert model.module.weight.sum() == 4
    assert model.weight.sum() == 2
    Masks({"module.weight": torch.zeros(2, 2, dtype=torch.bool)}).apply(model)
    assert model.module.weight.sum() == 0
    assert model.weight.sum() == 2


# Averaged


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.9)])
def test_an_average_that_is_masked_once_stays_so(multi_avg_fn: Any):
    """Pitfall 11: SWA and EMA; the average began dense, so it is masked when the model is."""
    model = mlp()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    train(model, optimizer, range(1))
    averaged.update_parameters(model)
    masks = half(model)
    masks.apply(model)
    assert not masks.is_applied_to(averaged)
    masks.apply(averaged)
    keys = list(averaged.state_dict())
    with masks.keep(optimizer, model):
        for step in range(1, 6):
            train(model, optimizer, range(step, step + 1))
            averaged.update_parameters(model)
            assert masks.is_applied_to(averaged)
    assert zero(masks, averaged.module)
    assert bool(averaged.module[0].weight[masks["0.weight"]].all())
    assert list(averaged.state_dict()) == keys
    fewer = masks & Masks({name: torch.rand(mask.shape) < 0.5 for name, mask in masks.items()})
    fewer.apply(averaged)
    assert fewer.is_applied_to(averaged)


# On two ranks


def group() -> tuple[int, slice]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    return rank, slice(rank, None, 2)


def sharded(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def trainings() -> dict[str, dict[str, Any]]:
    """The trainings of ``alone``, replicated and sharded: weights at the end, by way and optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    _, share = group()
    copies = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    ways: dict[str, Callable[[Any], Any]] = {
        "ddp": DistributedDataParallel,
        "fsdp": sharded,
        "hsdp": lambda model: sharded(model, mesh=copies),
    }
    found = {}
    for way, wrap in ways.items():
        for name, make in OPTIMIZERS.items():
            model = mlp()
            masks = half(model)
            model = wrap(model)
            optimizer = make(model.parameters())
            train(model, optimizer, range(2), share)
            assert not masks.is_applied_to(model)
            masks.apply(model)
            masks.clear_state(optimizer, model)
            with masks.keep(optimizer, model):
                for step in range(2, 7):
                    train(model, optimizer, range(step, step + 1), share)
                    assert masks.is_applied_to(model)
            assert masks.model_density(model) == masks.model_density(mlp())
            assert masks.stored_bytes(model) == masks.stored_bytes(mlp())
            assert list(model.state_dict()) == list(wrap(mlp()).state_dict())
            found[f"{way} {name}"] = {
                key.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).tolist()
                for key, p in model.named_parameters()
            }
    return found


def test_ranks_keep_what_one_process_keeps():
    first, second = on_ranks(trainings)
    assert len(first) == 6
    assert first == second
    for way, weights in first.items():
        for name, expected in alone(way.split()[1]).items():
            torch.testing.assert_close(torch.tensor(weights[name], dtype=torch.double), expected)
            if name in half(mlp()):
                assert torch.equal(torch.tensor(weights[name]) != 0, half(mlp())[name])


def details() -> list[Any]:
    """What sharded parameters are to masks, apart from training."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import distribute_tensor

    rank, share = group()
    seen: list[Any] = []
    model = sharded(mlp().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    masks = half(mlp())
    ones = Masks.ones(model)
    seen += [ones == Masks.ones(mlp()), type(ones["0.weight"]) is Tensor]
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks.apply(model)
    masks.keep(optimizer, model)
    train(model, optimizer, range(3), share)
    weight = model[0].weight
    seen += [masks.is_applied_to(model), weight.dtype == torch.float32]
    seen.append(not weight.full_tensor()[~masks["0.weight"]].any() and bool(weight.full_tensor().any()))

    if rank == 1 and not masks["0.weight"][5:].all():
        local(weight).fill_(1)  # on one rank only; all hear of it
    seen.append(not masks.is_applied_to(model))
    masks.apply(model)

    model(batch(0)[share].float()).square().mean().backward()
    masks.mask_gradients(model)
    seen.append(not weight.grad.full_tensor()[~masks["0.weight"]].any())
    for key in ("exp_avg", "exp_avg_sq"):
        local(optimizer.state[weight][key]).fill_(1)
    masks.clear_state(optimizer, model)
    for key in ("exp_avg", "exp_avg_sq"):
        seen.append(torch.equal(optimizer.state[weight][key].full_tensor() != 0, masks["0.weight"]))

    with pytest.raises(ValueError, match="mask 'w' is a DTensor: give a plain tensor that holds the whole mask"):
        Masks({"w": distribute_tensor(masks["0.weight"], weight.device_mesh, weight.placements)})
    with pytest.raises(ValueError, match=r"has shape \(5, 6\), the parameter \(9, 6\)"):
        Masks({"0.weight": masks["0.weight"][:5]}).apply(model)
    return seen


def test_sharded_parameters():
    for seen in on_ranks(details):
        assert seen == [True] * 9
