import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workbench.models import Conv, Conv2, Conv4, Conv6


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "convolutions", "everything"), [(Conv2, 38e3, 4.3e6), (Conv4, 260e3, 2.4e6), (Conv6, 1.1e6, None)]
)
def test_conv_has_the_published_sizes(make, convolutions, everything):
    """Frankle & Carbin 2019, figure 2, "All / conv weights"; of Conv-6 it says 1.7M in all.

    Its layers have more with 32x32 pixels: 4 x 4 x 256 inputs of 256 units alone are 1.05M beside the 1.1M.
    """
    model = make()
    assert count(model.features) == pytest.approx(convolutions, rel=0.05)
    if everything is None:
        everything = count(model.features) + (4 * 4 * 256 + 1) * 256 + 257 * 256 + 257 * 10
    assert count(model) == pytest.approx(everything, rel=0.02)


@pytest.mark.parametrize(
    ("make", "kinds"), [(Conv2, "CCP"), (Conv4, "CCPCCP"), (Conv6, "CCPCCPCCP")], ids=["2", "4", "6"]
)
def test_conv_layers_in_order(make, kinds):
    known = {nn.Conv2d: "C", nn.MaxPool2d: "P"}
    model = make("relu", 7, "batch", "he")
    assert "".join(known.get(type(m), "") for m in model.features) == kinds
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 64, 128, 128, 256, 256][: len(convs)]
    assert [m.out_features for m in model.head if isinstance(m, nn.Linear)] == [256, 256, 7]
    assert [type(m) for m in model.features[:3]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert model.init_args["init"] == "he"
    assert model.init_args["convolutions"] == len(convs)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_conv_is_the_formula(norm):
    torch.manual_seed(0)
    model = Conv(4, 3, 5, 4, "gelu", norm, 2, 11).double()
    x = torch.randn(3, 2, 11, 11, dtype=torch.float64)
    h = x
    for i, conv in enumerate(m for m in model.features if isinstance(m, nn.Conv2d)):
        h = F.conv2d(h, conv.weight, conv.bias, padding=1)
        if norm == "layer":
            mean, variance = h.mean((1, 2, 3), keepdim=True), h.var((1, 2, 3), correction=0, keepdim=True)
            h = (h - mean) / (variance + 1e-5).sqrt()
        h = F.gelu(h)
        h = F.max_pool2d(h, 2) if i % 2 else h
    h = h.reshape(3, 6 * 2 * 2)
    one, two, three = (m for m in model.head if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(x), three(F.gelu(two(F.gelu(one(h))))))


@pytest.mark.parametrize("size", [8, 9, 28, 33])
def test_conv_fits_every_size(size):
    assert Conv(6, 2, 4, image_size=size)(torch.zeros(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convolutions": 3}, "convolutions=3: give 2, 4 or 6"),
        ({"convolutions": 8}, "convolutions=8"),
        ({"width": 0}, "width=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"classes": 0}, "classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"convolutions": 6, "image_size": 7}, "image_size=7: 3 poolings need at least 8 pixels"),
        ({"norm": "instance"}, "norm='instance': use one of batch, group, layer, none"),
        ({"activation": "gleu"}, "Did you mean .*'gelu'"),
        ({"init": "x"}, "init='x'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Conv(**arguments)
