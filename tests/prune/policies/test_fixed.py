from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from prune.policies import Fixed
from prune.pruner import Pruner
from tests.helpers.bare_loop import SGD, net


def test_another_mask_is_not_resumed() -> None:
    mine, other = Fixed(Pruner()(net(), 0.3)), Fixed(Pruner()(net(), 0.4))
    assert mine.masks is not None
    assert other.masks is not None
    said = f"trained under mask {mine.masks.hash()[:12]}, but mask {other.masks.hash()[:12]} is given"
    with pytest.raises(ValueError, match=said):
        other.load_state_dict(mine.state_dict())
    assert other.masks == Pruner()(net(), 0.4)


def test_an_empty_layer_is_named_once() -> None:
    model, nothing = net(), Fixed({"0.weight": torch.ones(10, 6) > 0, "2.weight": torch.ones(3, 10) < 0})
    with pytest.warns(UserWarning, match=r"layer collapse: '2\.weight' keeps none of its 30") as caught:
        nothing.follow(model, SGD(model.parameters())).remove()
    assert len(caught) == 1
    layers = {"density/0.weight": 1.0, "density/2.weight": 0.0}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert nothing.densities() == {"density": 60 / 90, "model_density": 1 - 30 / parameters, **layers}


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_norm_without_weights_is_refused_before_training(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    name = "0.parametrizations.weight.original1"
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    wrapped = wrap(model)
    policy = Fixed({name: mask})
    with pytest.raises(
        ValueError, match=r"'0\.param.*' is under weight_norm, and 1 of its outputs would keep no weight"
    ):
        policy.follow(wrapped, SGD(model.parameters()))
    mask[1, 0] = True
    Fixed({name: mask}).follow(wrapped, SGD(model.parameters())).remove()
    assert model(torch.ones(1, 4)).isfinite().all()
