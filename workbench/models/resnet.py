"""Residual networks for small images."""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.models.activations import Init, init_, make
from workbench.models.arguments import check_choice
from workbench.models.norms import ChannelNorm, channel_norm


@final
class ResidualBlock(nn.Module):
    """f(norm(conv(f(norm(conv(x))))) + shortcut(x)), 3x3 kernels; [B, C, H, W] -> [B, channels, H/stride, W/stride].

    The shortcut is the identity, or where the shape changes a 1x1 convolution with a norm (option B).

    Args:
        in_channels: C.
        channels: Channels of the output.
        stride: Of the first convolution and of the shortcut.
        activation: f, a name from `workbench.models.activations`.
        norm: See `workbench.models.norms.channel_norm`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, activation: str, norm: ChannelNorm) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=bias)
        self.norm1 = channel_norm(norm, channels)
        self.act1 = make(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = channel_norm(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=bias), channel_norm(norm, channels)
            )
        self.act2 = make(activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels, H / stride, W / stride], rounded up."""
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(branch + self.shortcut(x))


@final
class ResNet(nn.Module):
    """The residual network for small images; [B, in_channels, H, W] -> [B, classes], H and W from 8 on.

    A 3x3 convolution, three stages of (depth - 2) / 6 ``ResidualBlock`` modules with width, 2 width and 4 width
    channels, the second and third at half the resolution of the one before, the mean over pixels, and a linear output.
    With 32x32 pixels, depth 20 and width 16 it has 272,474 weights. He et al. (2016), "Deep residual learning for image
    recognition", arXiv:1512.03385, section 4.2, with projections as shortcuts (option B) and any activation.

    Initial weights are those of `workbench.models.activations.init_`. Without a norm the sums of branch and shortcut
    would grow exponentially with the number of blocks L: the last convolution of every branch is then divided by sqrt L
    (Hayou et al. 2021, "Stable ResNet", arXiv:2010.12859). Even so, a GELU, SiLU or tanh that reads another one again
    and again shrinks its input: at depth 56 they need a norm.

    Args:
        depth: Layers with weights along the longest path: 6 n + 2 with n blocks in each stage.
        width: Channels of the first stage.
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
        depth: int = 20,
        width: int = 16,
        classes: int = 10,
        activation: str = "gelu",
        norm: ChannelNorm = "batch",
        in_channels: int = 3,
        init: Init = "own",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise ValueError(
                f"depth={depth}: give 6 n + 2 with n >= 1 blocks a stage (8, 14, 20, ...), such as {near}."
            )
        if min(width, classes, in_channels) < 1:
            raise ValueError(f"width={width}, classes={classes}, in_channels={in_channels}: all must be at least 1.")
        check_choice(ChannelNorm, norm=norm)
        self.init_args: dict[str, Any] = {
            "depth": depth,
            "width": width,
            "classes": classes,
            "activation": activation,
            "norm": norm,
            "in_channels": in_channels,
            "init": init,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=norm == "none"),
            channel_norm(norm, width),
            make(activation),
        )
        stages, before = [], width
        for channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            blocks = [ResidualBlock(before, channels, stride, activation, norm)]
            blocks += [ResidualBlock(channels, channels, 1, activation, norm) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            before = channels
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)
        init_(self, activation, init)
        if norm == "none":
            blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
            with torch.no_grad():
                for block in blocks:
                    block.conv2.weight.div_(math.sqrt(len(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes]."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))
