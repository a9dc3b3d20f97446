"""Conv-2, Conv-4 and Conv-6, the small convolutional nets of the lottery ticket paper."""

from typing import Any, final

from torch import Tensor, nn

from workbench.models.activations import Init, init_, make
from workbench.models.arguments import check_choice
from workbench.models.norms import ChannelNorm, channel_norm

_CONVOLUTIONS = (2, 4, 6)


@final
class Conv(nn.Module):
    """VGG in small: pairs of 3x3 convolutions, then three linear layers; [B, in_channels, S, S] -> [B, classes].

    The pairs have width, 2 width and 4 width channels, each behind it a norm and the activation, and 2x2 maximum
    pooling at the end of a pair; two hidden linear layers of ``hidden`` units, without a norm, and the output follow.
    With 32x32 pixels of 3 channels it has 4,301,642 (Conv-2), 2,425,930 (Conv-4) and 2,262,602 (Conv-6) parameters,
    convolutions 38,720, 260,160 and 1,145,408 (the paper says as much, but 1.7M in all for Conv-6).
    Frankle & Carbin (2019), "The lottery ticket hypothesis", arXiv:1803.03635, figure 2, with any activation and norm;
    they draw the initial weights by Glorot's rule instead, and prune 10% of the convolutions' weights (15% in Conv-6),
    20% of the linear layers' and 10% of the output's in a round.

    Args:
        convolutions: 2, 4 or 6.
        width: Channels of the first pair.
        hidden: Units of both hidden linear layers.
        classes: Size of the output.
        activation: A name from `workbench.models.activations`.
        norm: Of the convolutions: "none", "batch", "group" or "layer"; see `workbench.models.norms.channel_norm`.
        in_channels: Channels of the image.
        image_size: S, height and width in pixels, at least 2, 4 or 8 for 2, 4 or 6 convolutions.
        init: "own" for the activation's own gain, "he" for sqrt 2; see `workbench.models.activations.init_`.

    Raises:
        ValueError: A size out of range, or an unknown activation, norm or init.
    """

    def __init__(
        self,
        convolutions: int = 2,
        width: int = 64,
        hidden: int = 256,
        classes: int = 10,
        activation: str = "gelu",
        norm: ChannelNorm = "none",
        in_channels: int = 3,
        image_size: int = 32,
        init: Init = "own",
    ) -> None:
        super().__init__()
        if convolutions not in _CONVOLUTIONS:
            raise ValueError(f"convolutions={convolutions}: give 2, 4 or 6, or use ResNet for more.")
        if min(width, hidden, classes, in_channels) < 1:
            raise ValueError(
                f"width={width}, hidden={hidden}, classes={classes}, in_channels={in_channels}: all must be at least 1."
            )
        pairs = convolutions // 2
        if image_size < 2**pairs:
            raise ValueError(f"image_size={image_size}: {pairs} poolings need at least {2**pairs} pixels.")
        check_choice(ChannelNorm, norm=norm)
        self.init_args: dict[str, Any] = {
            "convolutions": convolutions,
            "width": width,
            "hidden": hidden,
            "classes": classes,
            "activation": activation,
            "norm": norm,
            "in_channels": in_channels,
            "image_size": image_size,
            "init": init,
        }
        layers: list[nn.Module] = []
        before = in_channels
        for channels in (width * 2**pair for pair in range(pairs)):
            for fan_in in (before, channels):
                layers.append(nn.Conv2d(fan_in, channels, 3, padding=1, bias=norm == "none"))
                if norm != "none":
                    layers.append(channel_norm(norm, channels))
                layers.append(make(activation))
            layers.append(nn.MaxPool2d(2))
            before = channels
        self.features = nn.Sequential(*layers)
        side = image_size // 2**pairs
        self.head = nn.Sequential(
            nn.Linear(before * side * side, hidden),
            make(activation),
            nn.Linear(hidden, hidden),
            make(activation),
            nn.Linear(hidden, classes),
        )
        init_(self, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, image_size, image_size] -> logits [B, classes]."""
        return self.head(self.features(x).flatten(1))


def Conv2(activation: str = "gelu", classes: int = 10, norm: ChannelNorm = "none", init: Init = "own") -> Conv:
    """Conv-2 for 32x32 pixels of 3 channels: a `Conv` of one pair of convolutions."""
    return Conv(2, classes=classes, activation=activation, norm=norm, init=init)


def Conv4(activation: str = "gelu", classes: int = 10, norm: ChannelNorm = "none", init: Init = "own") -> Conv:
    """Conv-4 for 32x32 pixels of 3 channels: a `Conv` of two pairs of convolutions."""
    return Conv(4, classes=classes, activation=activation, norm=norm, init=init)


def Conv6(activation: str = "gelu", classes: int = 10, norm: ChannelNorm = "none", init: Init = "own") -> Conv:
    """Conv-6 for 32x32 pixels of 3 channels: a `Conv` of three pairs of convolutions."""
    return Conv(6, classes=classes, activation=activation, norm=norm, init=init)
