"""Normalisation layers by name: of feature maps and of tokens."""

import math
from typing import Literal

from torch import nn

ChannelNorm = Literal["batch", "group", "layer", "none"]
TokenNorm = Literal["layer", "rms"]
_GROUPS, _EPS = 8, 1e-5


def channel_norm(norm: ChannelNorm, channels: int) -> nn.Module:
    """A normalisation of feature maps [B, channels, H, W].

    "batch" over batch and pixels; "group" over pixels and groups of channels, 8 groups where that divides their number
    (Wu & He 2018, arXiv:1803.08494); "layer" over pixels and all channels; "none" is the identity.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    return nn.GroupNorm(math.gcd(channels, _GROUPS) if norm == "group" else 1, channels)


def token_norm(norm: TokenNorm, width: int, bias: bool) -> nn.Module:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450), or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return nn.LayerNorm(width, _EPS, bias=bias) if norm == "layer" else nn.RMSNorm(width, _EPS)
