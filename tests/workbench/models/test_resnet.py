import pytest
import torch
from torch import nn

from tests.helpers.model_cases import parameters
from workbench.models import ResNet
from workbench.models.activations import swap_activation


def test_resnet_has_the_published_sizes():
    """He et al. 2016, table 6: 0.27 M at depth 20, 0.46 M at 32, and with the projections of option B 2,752 more."""
    assert parameters(ResNet()) == 269_722 + 2_752
    assert parameters(ResNet(32)) == 464_154 + 2_752
    assert parameters(ResNet(56)) == 853_018 + 2_752
    layers = [m for m in ResNet(32).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 32 + 2, "and two projections"


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_resnet_is_the_formula(norm):
    torch.manual_seed(0)
    model = ResNet(8, 3, 5, "gelu", norm, in_channels=2).double().train()
    x = torch.randn(4, 2, 9, 10, dtype=torch.float64)

    def normed(x, module):
        if norm == "none":
            return x
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + module.eps).sqrt()

    conv = nn.functional.conv2d
    h = nn.functional.gelu(normed(conv(x, model.stem[0].weight, model.stem[0].bias, padding=1), model.stem[1]))
    for stage, stride in zip(model.stages, (1, 2, 2)):
        (block,) = stage
        branch = conv(h, block.conv1.weight, block.conv1.bias, stride, 1)
        branch = conv(nn.functional.gelu(normed(branch, block.norm1)), block.conv2.weight, block.conv2.bias, 1, 1)
        short = h
        if stride == 2:
            short = normed(conv(h, block.shortcut[0].weight, block.shortcut[0].bias, stride), block.shortcut[1])
        h = nn.functional.gelu(normed(branch, block.norm2) + short)
    assert h.shape == (4, 12, 3, 3)
    torch.testing.assert_close(model(x), h.mean((2, 3)) @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_resnet_starts_neither_dead_nor_exploded(activation, norm):
    """Without the division by sqrt L, GELU of depth 20 without a norm starts with logits of about 20."""
    torch.manual_seed(0)
    model = ResNet(20, 8, activation=activation, norm=norm)
    x = torch.randn(16, 3, 16, 16)
    logits = model(x)
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert logits.detach().square().mean() < 9
    gradients = [float(m.weight.grad.norm()) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert min(gradients) > 1e-3
    assert max(gradients) < 5


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (6, 2), (7, 1), (16, 8), (24, 8)])
def test_group_norm_divides_the_channels(channels, groups):
    assert ResNet(8, channels, norm="group").stem[1].num_groups == groups
    assert ResNet(8, channels, norm="layer").stem[1].num_groups == 1


def test_resnet_swaps_its_activation():
    model = swap_activation(ResNet(8, 4), "relu")
    assert model.init_args["activation"] == "relu"
    assert [type(m).__name__ for m in model.modules() if "LU" in type(m).__name__] == ["ReLU"] * 7
