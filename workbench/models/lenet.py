"""LeNet-5."""

from typing import Any, final

from torch import Tensor, nn

from workbench.models.activations import Init, init_, make


@final
class LeNet5(nn.Module):
    """The 6-16-120-84 convolutional net; [B, in_channels, image_size, image_size] -> [B, classes].

    Two convolutions, each with activation and 2x2 average pooling (smooth, as in the original), then two
    hidden linear layers and the output. 5x5 kernels: unpadded from 32 pixels on, the first padded by 2 from
    12 on (28 gives the classic 16 x 5 x 5 as well); below, padded 3x3 kernels. LeCun et al. (1998),
    "Gradient-based learning applied to document recognition".

    Args:
        in_channels: Channels of the image.
        classes: Size of the output.
        activation: A name from `workbench.models.activations`.
        image_size: Height and width in pixels, at least 8.
        init: "own" for the activation's own gain, "he" for sqrt 2; see `workbench.models.activations.init_`.

    Raises:
        ValueError: A size out of range, or an unknown activation or init.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        activation: str = "gelu",
        image_size: int = 28,
        init: Init = "own",
    ) -> None:
        super().__init__()
        if min(in_channels, classes) < 1:
            raise ValueError(f"in_channels={in_channels}, classes={classes}: both must be at least 1.")
        if image_size < 8:
            raise ValueError(f"image_size={image_size}: LeNet5 needs at least 8 pixels; enlarge the images or use MLP.")
        self.init_args: dict[str, Any] = {
            "in_channels": in_channels,
            "classes": classes,
            "activation": activation,
            "image_size": image_size,
            "init": init,
        }
        if image_size < 12:
            kernel, first, second, side = 3, 1, 1, image_size // 2 // 2
        else:
            kernel, first, second = 5, (0 if image_size >= 32 else 2), 0
            side = ((image_size + 2 * first - 4) // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel, padding=first),
            make(activation),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, kernel, padding=second),
            make(activation),
            nn.AvgPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(16 * side * side, 120),
            make(activation),
            nn.Linear(120, 84),
            make(activation),
            nn.Linear(84, classes),
        )
        init_(self, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, image_size, image_size] -> logits [B, classes]."""
        return self.head(self.features(x).flatten(1))
