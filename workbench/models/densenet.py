"""Densely connected networks for small images."""

from math import floor
from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.models.activations import Init, init_, make
from workbench.models.arguments import check_choice
from workbench.models.norms import ChannelNorm, channel_norm


def _stage(fan_in: int, channels: int, kernel: int, activation: str, norm: ChannelNorm) -> list[nn.Module]:
    """ChannelNorm, activation and convolution, in this order."""
    conv = nn.Conv2d(fan_in, channels, kernel, padding=kernel // 2, bias=norm == "none")
    return [channel_norm(norm, fan_in), make(activation), conv]


@final
class DenseBlock(nn.Module):
    """Layers that each read the block's input and all layers before; [B, C, H, W] -> [B, C + layers growth, H, W].

    Layer l adds H_l([x_0, ..., x_(l-1)]), ``growth`` channels by norm, activation and a 3x3 convolution; with a
    bottleneck, a norm, an activation and a 1x1 convolution to 4 growth channels come before. Huang et al. (2017),
    arXiv:1608.06993, equation 2.

    Args:
        in_channels: C.
        growth: Channels that a layer adds, k.
        layers: Their number.
        activation: A name from `workbench.models.activations`.
        norm: See `workbench.models.norms.channel_norm`.
        bottleneck: Whether layers have one.
    """

    def __init__(
        self, in_channels: int, growth: int, layers: int, activation: str, norm: ChannelNorm, bottleneck: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for fan_in in range(in_channels, in_channels + layers * growth, growth):
            squeeze = _stage(fan_in, 4 * growth, 1, activation, norm) if bottleneck else []
            self.layers.append(
                nn.Sequential(*squeeze, *_stage(4 * growth if bottleneck else fan_in, growth, 3, activation, norm))
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + layers growth, H, W], the input first."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@final
class DenseNet(nn.Module):
    """The densely connected network for small images; [B, in_channels, H, W] -> [B, classes], H and W from 4 on.

    A 3x3 convolution; three `DenseBlock`s, between two of them norm, activation, a 1x1 convolution and 2x2 average
    pooling; norm, activation, the mean over pixels, and a linear output. The first convolution has 16 channels, with
    bottlenecks 2 growth. Huang et al. (2017), "Densely connected convolutional networks", arXiv:1608.06993, sections 3
    and 4.2, without their dropout: depth 40 and growth 12 has 1,019,722 parameters, `DenseNetBC` of depth 100 has
    769,162. Convolutions have biases only without a norm.

    Args:
        depth: Layers with weights along the longest path: 3 n + 4 with n layers a block, with bottlenecks 6 n + 4.
        growth: Channels that a layer adds, k.
        bottleneck: Whether a 1x1 convolution to 4 growth channels comes before every 3x3 one (DenseNet-B).
        compression: Share of the channels that is left between blocks, in (0, 1] (below 1 DenseNet-C).
        classes: Size of the output.
        activation: A name from `workbench.models.activations`.
        norm: "batch", "group", "layer" or "none"; see `workbench.models.norms.channel_norm`.
        in_channels: Channels of the image.
        init: "own" for the activation's own gain, "he" for sqrt 2; see `workbench.models.activations.init_`.

    Raises:
        ValueError: A size out of range, or an unknown activation, norm or init.
    """

    def __init__(
        self,
        depth: int = 40,
        growth: int = 12,
        bottleneck: bool = False,
        compression: float = 1.0,
        classes: int = 10,
        activation: str = "gelu",
        norm: ChannelNorm = "batch",
        in_channels: int = 3,
        init: Init = "own",
    ) -> None:
        super().__init__()
        step = 6 if bottleneck else 3
        if depth < step + 4 or (depth - 4) % step:
            near = max(step + 4, step * round((depth - 4) / step) + 4)
            raise ValueError(
                f"depth={depth}, bottleneck={bottleneck}: give {step} n + 4 with n >= 1 layers a block, such as {near}."
            )
        if min(growth, classes, in_channels) < 1:
            raise ValueError(f"growth={growth}, classes={classes}, in_channels={in_channels}: all must be at least 1.")
        channels = 2 * growth if bottleneck else 16
        if not 0 < compression <= 1:
            raise ValueError(f"compression={compression}: give a share of the channels above 0, at most 1.")
        check_choice(ChannelNorm, norm=norm)
        self.init_args: dict[str, Any] = {
            "depth": depth,
            "growth": growth,
            "bottleneck": bottleneck,
            "compression": compression,
            "classes": classes,
            "activation": activation,
            "norm": norm,
            "in_channels": in_channels,
            "init": init,
        }
        layers = (depth - 4) // step
        features: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm == "none")]
        for block in range(3):
            if block:
                kept = max(1, floor(compression * channels))
                features.append(nn.Sequential(*_stage(channels, kept, 1, activation, norm), nn.AvgPool2d(2)))
                channels = kept
            features.append(DenseBlock(channels, growth, layers, activation, norm, bottleneck))
            channels += layers * growth
        self.features = nn.Sequential(*features, channel_norm(norm, channels), make(activation))
        self.head = nn.Linear(channels, classes)
        init_(self, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes]."""
        return self.head(self.features(x).mean((2, 3)))


def DenseNetBC(
    depth: int = 100, growth: int = 12, activation: str = "gelu", classes: int = 10, norm: ChannelNorm = "batch"
) -> DenseNet:
    """DenseNet-BC: a `DenseNet` with bottlenecks and half of the channels between blocks."""
    return DenseNet(depth, growth, True, 0.5, classes, activation, norm)
