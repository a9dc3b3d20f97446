"""The layers of a transformer: attention, feed-forward net, and both with their norms."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.activations import GLU, glu_width, make
from workbench.models.norms import TokenNorm, token_norm

RotaryEmbedding = tuple[Tensor, Tensor]


def rotary_embedding(
    positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32, base: float = 10_000.0
) -> RotaryEmbedding:
    r"""Rotary embedding: cosines and sines of the angles :math:`p\,\text{base}^{-2i/d}` of positions p and pairs i.

    Args:
        positions: Of tokens, int64 [B or 1, L].
        head_dim: d, even.
        dtype: Of queries and keys; angles are float32 at least, as bfloat16 has no integers beyond 256.
        base: Longest wavelength over 2 pi, in tokens.

    Returns:
        Two tensors [B or 1, 1, L, d / 2].

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864, equations 14 and 15.
    """
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    angles = (positions[..., None].to(wide) * base ** (-pairs / head_dim))[:, None]
    return angles.cos(), angles.sin()


def apply_rotary_embedding(x: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Queries or keys [B, heads, L, d], every pair (i, i + d / 2) of dimensions rotated by its angle."""
    (cos, sin), (a, b) = rotary, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def pairwise_attention_mask(real: Tensor, causal: bool) -> Tensor:
    """Attention mask, True where a query may attend to a key: to real tokens, if causal none later, and to itself.

    So padding does not affect real tokens, and every row of the mask has a True.

    Args:
        real: True where tokens are real, bool [B, L].
        causal: Whether later tokens are masked.

    Returns:
        bool [B, 1, L, L], queries before keys.
    """
    steps = torch.arange(real.shape[1], device=real.device)
    mask = real[:, None, None, :] | (steps[:, None] == steps)
    return mask & (steps[:, None] >= steps) if causal else mask


@final
class Attention(nn.Module):
    r"""Multi-head self-attention, :math:`\text{softmax}(q k^T / \sqrt d)\, v` in every head; [B, L, D] -> [B, L, D].

    The number of heads is read off the matrices, so that heads may be taken out of them. Vaswani et al. 2017,
    "Attention is all you need", arXiv:1706.03762, equation 1 and section 3.2.2.

    Args:
        width: D.
        heads: A divisor of it; each is ``head_dim`` = D / heads wide.
        causal: Whether a token sees none behind it.
        dropout: Of the attention's weights, in [0, 1).
        bias: Whether the four maps have biases.
    """

    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.head_dim, self.causal, self.dropout = width // heads, causal, dropout
        self.query = nn.Linear(width, width, bias)
        self.key = nn.Linear(width, width, bias)
        self.value = nn.Linear(width, width, bias)
        self.output = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: RotaryEmbedding | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D].

        Args:
            x: Hidden states.
            mask: As from `pairwise_attention_mask`; None if nothing is padding.
            rotary: As from `rotary_embedding`, by which queries and keys are rotated.
        """
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if rotary is not None:
            q, k = apply_rotary_embedding(q, rotary), apply_rotary_embedding(k, rotary)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal and mask is None)
        return self.output(mixed.transpose(1, 2).flatten(2))


@final
class FeedForward(nn.Module):
    """down(f(up(x))); [..., width] -> [..., width].

    Args:
        width: Size of the last axis.
        hidden: Width in between.
        activation: f, a name from `workbench.models.activations`.
        bias: Whether the two maps have biases.
    """

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias)
        self.activation = make(activation)
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.down(self.activation(self.up(x)))


@final
class TransformerLayer(nn.Module):
    """Attention and a feed-forward net, each with a norm and a residual connection; [B, L, width] -> [B, L, width].

    A branch g gives x + g(norm(x)) if ``pre_norm``, else norm(x + g(x)).

    Args:
        width: Hidden size.
        heads: Attention heads, a divisor of it.
        width_ffn: Hidden width of a feed-forward net of two matrices; a gated one, which has three, is
            `glu_width(width_ffn)` wide.
        activation: A name from `workbench.models.activations`.
        gated: Whether the feed-forward net is a `GLU`.
        norm: "layer" or "rms".
        pre_norm: Where the norms are.
        causal: Whether a token sees none behind it.
        dropout: Of the attention's weights and of what both branches add, in [0, 1).
        bias: Whether maps and layer norms have biases.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        width_ffn: int,
        activation: str,
        gated: bool = False,
        norm: TokenNorm = "layer",
        pre_norm: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = token_norm(norm, width, bias)
        self.attention = Attention(width, heads, causal, dropout, bias)
        self.norm2 = token_norm(norm, width, bias)
        self.feed_forward = (
            GLU(width, glu_width(width_ffn), width, activation, bias)
            if gated
            else FeedForward(width, width_ffn, activation, bias)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: RotaryEmbedding | None = None) -> Tensor:
        """Hidden states [B, L, width] -> [B, L, width]; see `Attention` for the others."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x), mask, rotary))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask, rotary)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))
