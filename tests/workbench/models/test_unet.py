import json

import pytest
import torch
from torch import nn

from tests.helpers.model_cases import parameters
from workbench.data import Shapes
from workbench.models import UNet


@pytest.mark.parametrize("size", [(16, 16), (17, 22), (8, 31)])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_output_has_the_size_of_the_image(size, depth):
    model = UNet(4, depth, classes=5, in_channels=2)
    assert model(torch.zeros(2, 2, *size)).shape == (2, 5, *size)


def test_channels_double_and_skips_are_joined():
    model = UNet(8, 2, classes=3, in_channels=1, norm="none")
    shapes = [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, nn.Conv2d)]
    down = [(8, 1), (8, 8), (16, 8), (16, 16), (32, 16), (32, 32)]
    assert shapes == [*down, (16, 48), (16, 16), (8, 24), (8, 8), (3, 8)]
    assert parameters(model) == sum(9 * a * b + a for a, b in shapes[:-1]) + 27


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_a_model_from_its_own_init_args(norm):
    torch.manual_seed(0)
    model = UNet(4, 2, 3, "silu", norm, 1, "he").eval()
    again = UNet(**json.loads(json.dumps(model.init_args))).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(again(x), model(x))


def test_shapes_are_learnt():
    torch.manual_seed(0)
    data = Shapes(16, train=160)
    model = UNet(8, 2, 4, in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = next(iter(data.test_dataloader()))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"width": 0}, "width=0"),
        ({"norm": "instance"}, "norm='instance': use one of batch"),
        ({"activation": "gleu"}, "Did you mean .*'gelu'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)
