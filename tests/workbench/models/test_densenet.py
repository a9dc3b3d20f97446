import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workbench.models import DenseNet, DenseNetBC


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "depth", "growth", "millions"),
    [
        (DenseNet, 40, 12, 1.0),
        (DenseNet, 100, 12, 7.0),
        (DenseNet, 100, 24, 27.2),
        (DenseNetBC, 100, 12, 0.8),
        (DenseNetBC, 250, 24, 15.3),
        (DenseNetBC, 190, 40, 25.6),
    ],
)
def test_densenet_has_the_published_sizes(make, depth, growth, millions):
    """Huang et al. 2017, table 2."""
    with torch.device("meta"):
        model = make(depth, growth)
    assert round(count(model) / 1e6, 1) == millions
    weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == depth


def test_defaults_have_the_sizes_they_say():
    with torch.device("meta"):
        assert count(DenseNet()) == 1_019_722
        assert count(DenseNetBC()) == 769_162
        found = DenseNetBC(40, norm="layer").init_args
    assert found.items() >= {"depth": 40, "bottleneck": True, "compression": 0.5, "norm": "layer"}.items()


def naive(model, x, layers, bottleneck, norm):
    """Lists of feature maps, put side by side where they are read; weights taken in the order of definition."""
    convs = iter([m for m in model.modules() if isinstance(m, nn.Conv2d)])

    def read(x, pad):
        conv = next(convs)
        if norm == "batch":
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
        return F.conv2d(F.silu(x), conv.weight, conv.bias, padding=pad)

    stem = next(convs)
    x = F.conv2d(x, stem.weight, stem.bias, padding=1)
    for block in range(3):
        maps = [x]
        for _ in range(layers):
            h = torch.cat(maps, 1)
            maps.append(read(read(h, 0), 1) if bottleneck else read(h, 1))
        x = torch.cat(maps, 1)
        if block < 2:
            x = F.avg_pool2d(read(x, 0), 2)
    if norm == "batch":
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert next(convs, None) is None
    return F.linear(F.silu(x).mean((2, 3)), model.head.weight, model.head.bias)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("bottleneck", "compression"), [(False, 1.0), (True, 0.5), (False, 0.7)])
def test_densenet_is_the_formula(norm, bottleneck, compression):
    torch.manual_seed(0)
    depth = 16 if bottleneck else 10
    model = DenseNet(depth, 3, bottleneck, compression, 4, "silu", norm, 2).double().train()
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), naive(model, x, 2, bottleneck, norm))


def test_channels_between_blocks():
    model = DenseNet(10, 5, compression=0.5, in_channels=1)
    convs = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convs == [(1, 16), (16, 5), (21, 5), (26, 13), (13, 5), (18, 5), (23, 11), (11, 5), (16, 5)]
    assert model.head.in_features == 21
    assert DenseNet(10, 5, bottleneck=True).features[0].out_channels == 10


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_densenet_starts_neither_dead_nor_exploded(activation, norm):
    torch.manual_seed(0)
    model = DenseNet(22, 6, activation=activation, norm=norm)
    logits = model(torch.randn(16, 3, 16, 16))
    F.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert logits.detach().square().mean() < 9
    gradients = [float(m.weight.grad.norm()) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert min(gradients) > 1e-3
    assert max(gradients) < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 41}, r"depth=41, bottleneck=False: give 3 n \+ 4 .* such as 40"),
        ({"depth": 4}, "depth=4, .* such as 7"),
        ({"depth": 43, "bottleneck": True}, r"depth=43, bottleneck=True: give 6 n \+ 4 .* such as 40"),
        ({"growth": 0}, "growth=0"),
        ({"classes": 0}, "classes=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"compression": 0.0}, r"compression=0\.0: give a share"),
        ({"compression": 1.5}, r"compression=1\.5"),
        ({"norm": "instance"}, "norm='instance': use one of batch, group, layer, none"),
        ({"activation": "gleu"}, "Did you mean .*'gelu'"),
        ({"init": "x"}, "init='x'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**arguments)
