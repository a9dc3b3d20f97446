"""U-Net, for dense prediction."""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.activations import Init, init_, make
from workbench.models.arguments import check_choice
from workbench.models.norms import ChannelNorm, channel_norm


@final
class UNet(nn.Module):
    """The U-Net; images [B, in_channels, H, W] -> logits [B, classes, H, W], H and W of at least 2^depth.

    ``depth`` times two 3x3 convolutions and 2x2 maximum pooling, which doubles the channels from ``width`` on; two
    convolutions more; then back, ``depth`` times enlarged to the resolution before (nearest pixel), joined with what
    was there, and two convolutions; and a 1x1 convolution to the classes. Behind each 3x3 convolution a norm and the
    activation. Ronneberger et al. (2015), "U-Net: convolutional networks for biomedical image segmentation",
    arXiv:1505.04597, with padding, so that the output has the image's size, and nearest pixels instead of transposed
    convolutions.

    Args:
        width: Channels at full resolution.
        depth: Number of poolings.
        classes: Channels of the output; 1 for the task `Binary`.
        activation: A name from `workbench.models.activations`.
        norm: "batch", "group", "layer" or "none"; see `workbench.models.norms.channel_norm`.
        in_channels: Channels of the image.
        init: "own" for the activation's own gain, "he" for sqrt 2; see `workbench.models.activations.init_`.

    Raises:
        ValueError: A size out of range, or an unknown activation, norm or init.
    """

    def __init__(
        self,
        width: int = 16,
        depth: int = 3,
        classes: int = 2,
        activation: str = "gelu",
        norm: ChannelNorm = "batch",
        in_channels: int = 3,
        init: Init = "own",
    ) -> None:
        super().__init__()
        if min(width, depth, classes, in_channels) < 1:
            raise ValueError(
                f"width={width}, depth={depth}, classes={classes}, in_channels={in_channels}: all must be at least 1."
            )
        check_choice(ChannelNorm, norm=norm)
        self.init_args: dict[str, Any] = {
            "width": width,
            "depth": depth,
            "classes": classes,
            "activation": activation,
            "norm": norm,
            "in_channels": in_channels,
            "init": init,
        }
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _two_convolutions(before, channels, activation, norm)
            for before, channels in zip([in_channels, *widths], widths)
        )
        self.up = nn.ModuleList(
            _two_convolutions(below + channels, channels, activation, norm)
            for below, channels in zip(reversed(widths[1:]), reversed(widths[:-1]))
        )
        self.head = nn.Conv2d(width, classes, 1)
        init_(self, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes, H, W]."""
        skips: list[Tensor] = []
        for block in self.down:
            if skips:
                x = F.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1])):
            x = block(torch.cat((F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip), 1))
        return self.head(x)


def _two_convolutions(in_channels: int, channels: int, activation: str, norm: ChannelNorm) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in (in_channels, channels):
        layers.append(nn.Conv2d(fan_in, channels, 3, padding=1, bias=norm == "none"))
        layers += [] if norm == "none" else [channel_norm(norm, channels)]
        layers.append(make(activation))
    return nn.Sequential(*layers)
