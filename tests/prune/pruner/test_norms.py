import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prune.masks import Masks
from prune.policies import Dynamic
from prune.pruner import Pruner
from prune.pruner.norms import lifted

V = "parametrizations.weight.original1"


def net(norm: Any = parametrizations.weight_norm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(10, 8)), nn.ReLU(), nn.Linear(8, 3))


def finite(model: nn.Module, masks: Masks) -> bool:
    masks.apply(model)
    return bool(model(torch.randn(4, 10)).isfinite().all())


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("structure", ["unstructured", "balanced", "2:5", "1x5"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_every_output_keeps_a_weight_and_the_count_is_exact(criterion: str, structure: str, allocation: str) -> None:
    model = net()
    exclude = None if structure in ("unstructured", "balanced") else "2.*"
    densities, unit = ((0.75, 0.6), 5) if structure == "1x5" else ((0.15, 0.125), 1)
    masks = None
    for density in densities:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* keep .* more than|layer collapse")
            masks = Pruner(criterion, structure, allocation, exclude=exclude)(model, density, within=masks)
        total = sum(count for _, count in masks.counts().values())
        assert sum(kept for kept, _ in masks.counts().values()) == math.floor(total / unit * density + 0.5) * unit
        assert bool(masks[f"0.{V}"].any(1).all())
    assert masks is not None
    assert finite(model, masks)


def test_the_best_of_an_output_is_kept_however_small_it_is() -> None:
    model = net()
    with torch.no_grad():
        model[0].parametrizations.weight.original0[3] = 1e-9  # the whole output is small: v alone does not tell
    masks = Pruner(include="0.*")(model, 0.3)
    row = masks[f"0.{V}"][3]
    assert row.tolist() == [i == int(model[0].weight[3].abs().argmax()) for i in range(10)]


def test_magnitude_is_that_of_the_product() -> None:
    """The largest g * v / ||v||, not the largest v: those have any scale."""
    model = net()
    with torch.no_grad():
        model[0].parametrizations.weight.original1[:4] *= 1000
    kept = Pruner(include="0.*")(model, 0.5)[f"0.{V}"]
    assert torch.equal(kept, Pruner(include="0.*")(net(), 0.5)[f"0.{V}"])
    effective = model[0].weight.detach().abs()
    assert effective[kept].min() >= effective[~kept].max()


def test_a_density_without_a_weight_for_each_output_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"density 0.05 keeps 5, but '0.parametri.*' need 8, one an output"):
        Pruner().check(net(), 0.5, 0.05)
    with pytest.raises(ValueError, match="raise the density, exclude them, or remove the weight_norm"):
        Pruner()(net(), 0.05)
    with pytest.raises(ValueError, match=r"density 0.4 keeps 6, but '0.parametri.*' need 8"):
        Pruner(structure="1x5", include="0.*").check(net(), 0.4)


def test_masks_that_leave_an_output_without_weights_are_refused() -> None:
    within = torch.ones(8, 10, dtype=torch.bool)
    within[2] = False
    masks = Masks({f"0.{V}": within, "2.weight": torch.ones(3, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="1 of its outputs would keep no weight, which makes them NaN"):
        Pruner()(net(), 0.5, within=masks)


def test_lifted_takes_from_those_that_have_more() -> None:
    with pytest.warns(UserWarning, match="'a' keep 6 more than the allocation gives them"):
        counts = lifted({"a": 2, "b": 10, "c": 5, "d": 1}, {"a": 8})
    assert counts == {"a": 8, "b": 5, "c": 4, "d": 1}
    assert lifted({"a": 8, "b": 1}, {"a": 8}) == {"a": 8, "b": 1}
    with pytest.raises(ValueError, match=r"'a' need 6 more, .* have 3 to give"):
        lifted({"a": 2, "b": 4}, {"a": 8})


@pytest.mark.parametrize("growth", ["rigl", "set"])
def test_connections_that_move_leave_every_output_one(growth: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = Dynamic(0.15, "0it", "20it", "1it", growth, fraction=1.0, decay="constant")
    inputs: Tensor = torch.randn(16, 10)
    with policy.follow(model, optimizer):
        for _ in range(8):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            assert policy.masks is not None
            assert bool(policy.masks[f"0.{V}"].any(1).all())
            assert bool(model(inputs).isfinite().all())
