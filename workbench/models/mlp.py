"""Multilayer perceptrons."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, final

from torch import Tensor, nn

from workbench.models.activations import Init, init_, make
from workbench.models.arguments import check_choice

Norm = Literal["none", "layer", "batch"]


@final
class MLP(nn.Module):
    """Linear, norm and activation for every hidden width, then a linear output; [B, ...] -> [B, classes].

    Args:
        in_features: Size of one input, all its axes together.
        hidden: Widths of the hidden layers; empty for a linear model.
        classes: Size of the output.
        activation: A name from `workbench.models.activations`.
        norm: Normalisation before each activation: "none", "layer" or "batch".
        init: "own" for the activation's own gain, "he" for sqrt 2; see `workbench.models.activations.init_`.

    Raises:
        ValueError: A size below 1, or an unknown activation, norm or init.
    """

    def __init__(
        self,
        in_features: int = 64,
        hidden: Sequence[int] = (100, 100),
        classes: int = 10,
        activation: str = "gelu",
        norm: Norm = "none",
        init: Init = "own",
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden, classes]
        if min(widths) < 1:
            raise ValueError(f"in_features={in_features}, hidden={list(hidden)}, classes={classes}: give sizes >= 1.")
        check_choice(Norm, norm=norm)
        self.init_args: dict[str, Any] = {
            "in_features": in_features,
            "hidden": list(hidden),
            "classes": classes,
            "activation": activation,
            "norm": norm,
            "init": init,
        }
        layers: list[nn.Module] = []
        for fan_in, width in pairwise(widths[:-1]):
            layers.append(nn.Linear(fan_in, width))
            if norm != "none":
                layers.append(nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width))
            layers.append(make(activation))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], classes))
        init_(self, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] with in_features numbers each -> logits [B, classes]."""
        return self.layers(x.flatten(1))


def LeNet300(activation: str = "gelu", classes: int = 10, norm: Norm = "none", init: Init = "own") -> MLP:
    """LeNet-300-100 for 28x28 images, an `MLP` 784-300-100-classes (LeCun et al. 1998)."""
    return MLP(784, (300, 100), classes, activation, norm, init)
