import pytest
import torch

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
