import pytest
import torch

from tests.helpers.model_cases import parameters
from workbench.models import MLP, LeNet5, LeNet300
from workbench.models.activations import gain


def test_mlp_layers_in_order():
    layers = [type(m).__name__ for m in MLP(4, [3, 2], norm="layer", activation="silu").layers]
    assert layers == ["Linear", "LayerNorm", "SiLU", "Linear", "LayerNorm", "SiLU", "Linear"]
    layers = [type(m).__name__ for m in MLP(4, [3], norm="batch", activation="relu").layers]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(m).__name__ for m in MLP(4, []).layers] == ["Linear"]


def test_init_is_that_of_the_activation():
    torch.manual_seed(0)
    deviations = [
        float(m.weight.detach().std() * m.in_features**0.5)
        for m in MLP(400, [400, 400], 400).layers
        if hasattr(m, "weight")
    ]
    assert deviations == pytest.approx([1.0, gain("gelu"), 1.0], rel=0.02)
    torch.manual_seed(0)
    he = MLP(400, [400, 400], 400, init="he").layers
    assert float(he[2].weight.detach().std() * 20) == pytest.approx(2**0.5, rel=0.02)


def test_init_args_do_not_alias_the_argument():
    hidden = [3, 4]
    model = MLP(2, hidden)
    hidden.append(5)
    assert model.init_args["hidden"] == [3, 4]


def test_classic_sizes():
    assert parameters(LeNet5()) == parameters(LeNet5(image_size=32)) == 61_706
    assert parameters(LeNet300()) == 266_610
    assert LeNet300("relu").init_args["hidden"] == [300, 100]
    assert LeNet300()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
