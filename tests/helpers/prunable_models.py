"""Models to prune, and a pruner's call without its warnings."""

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from prune.masks import Masks
from prune.pruner import Pruner


class Small(nn.Module):
    """One of each thing that scope has an opinion on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 3, 3)
        self.up = nn.ConvTranspose1d(3, 2, 4)
        self.norm = nn.BatchNorm2d(3)
        self.layer_norm = nn.LayerNorm(8)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.body = nn.ModuleDict({"in": nn.Linear(8, 6), "out": nn.Linear(6, 4)})
        self.decoder = nn.Linear(8, 11)


SCOPE = ["conv.weight", "up.weight", "bilinear.weight", "body.in.weight", "body.out.weight", "decoder.weight"]


def mlp(*sizes: int) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def quiet(pruner: Pruner, model: nn.Module, density: float, within: Masks | None = None) -> Masks:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer collapse|.* matrices that stay dense")
        return pruner(model, density, within)
