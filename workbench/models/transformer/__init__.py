"""A small transformer: a classifier of texts and series, or a language model."""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from workbench.models.activations import Init, gain
from workbench.models.arguments import check_choice
from workbench.models.encoder import Pooling, pool
from workbench.models.norms import TokenNorm, token_norm
from workbench.models.transformer.layers import TransformerLayer, pairwise_attention_mask, rotary_embedding

Positions = Literal["learned", "rotary"]
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""Names of gated feed-forward nets and the activation of each one's gate."""


@final
class Transformer(nn.Module):
    r"""A transformer's encoder or decoder, with any activation, plain or gated, and either place of its norms.

    Tokens [B, L] or numbers [B, L, features] -> logits [B, classes] of whole sequences, or, without ``classes``, logits
    [B, L, vocabulary] of a token at every position: the next one if ``causal``, else the one that was masked there.
    Vaswani et al. 2017, arXiv:1706.03762, with the norms behind the sums, or in front of the branches and once more
    before the output (Xiong et al. 2020, "On layer normalization", arXiv:2002.04745).

    Gated feed-forward nets (Shazeer 2020, "GLU variants", arXiv:2002.05202) have as many weights as plain ones: their
    three matrices are 2/3 of ``width_ffn`` wide, rounded to the nearest integer, which is a difference of at most
    ``width`` entries a layer, and of ``width_ffn`` / 3 biases.

    Padding, on either side, changes nothing: no real token attends to it, and positions count real tokens only.

    Initial weights are :math:`N(0, \text{gain}^2 / \text{inputs})`, biases 0. The gain is 1 for what reads normalised
    states, values or inputs, and the activation's own for the matrix behind it. The two matrices of a layer that write
    to the residual stream are divided by :math:`\sqrt{2\,\text{layers}}` if ``pre_norm``, so that the sum of all
    branches is no larger than its input (Radford et al. 2019, GPT-2, section 2.3). Embeddings, of positions too, are
    :math:`N(0, 1 / \text{width})` and multiplied by :math:`\sqrt{\text{width}}` where they are read, so that they can
    be tied to an output (arXiv:1706.03762, section 3.4).

    Args:
        vocabulary: Number of tokens; give this or ``features``.
        features: Numbers at each position of a series.
        classes: Of a whole sequence; None for a language model.
        width: Hidden size.
        layers: How many.
        heads: Attention heads of each, a divisor of ``width``.
        width_ffn: Width of a feed-forward net of two matrices.
        activation: A name from `workbench.models.activations`; or "swiglu", "geglu" or "reglu", which are "silu",
            "gelu" and "relu" with ``gated``.
        gated: Whether feed-forward nets are gated.
        norm: "layer" or "rms".
        pre_norm: Whether norms are in front of the branches.
        positions: "learned" embeddings, added; or "rotary", which rotates queries and keys (arXiv:2104.09864).
        max_length: Most tokens of a sequence, padding included, for learned positions; rotary ones know no limit.
        dropout: Of embeddings, attention's weights and what branches add, in [0, 1).
        causal: Whether a position sees none behind it.
        pooling: Of a classifier: "mean" of all real positions, or "cls", the first of them.
        tied: Whether the output of a language model is the embedding.
        bias: Whether maps and layer norms have biases.
        init: "own" for the activation's own gain, "he" for sqrt 2.

    Raises:
        ValueError: A size out of range, arguments that exclude each other, or an unknown name.
    """

    def __init__(
        self,
        vocabulary: int | None = None,
        features: int | None = None,
        classes: int | None = None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        width_ffn: int = 512,
        activation: str = "gelu",
        gated: bool = False,
        norm: TokenNorm = "layer",
        pre_norm: bool = True,
        positions: Positions = "learned",
        max_length: int = 512,
        dropout: float = 0.1,
        causal: bool = False,
        pooling: Pooling = "mean",
        tied: bool = False,
        bias: bool = True,
        init: Init = "own",
    ) -> None:
        super().__init__()
        if activation in GATED:
            activation, gated = GATED[activation], True
        self.init_args: dict[str, Any] = {
            "vocabulary": vocabulary,
            "features": features,
            "classes": classes,
            "width": width,
            "layers": layers,
            "heads": heads,
            "width_ffn": width_ffn,
            "activation": activation,
            "gated": gated,
            "norm": norm,
            "pre_norm": pre_norm,
            "positions": positions,
            "max_length": max_length,
            "dropout": dropout,
            "causal": causal,
            "pooling": pooling,
            "tied": tied,
            "bias": bias,
            "init": init,
        }
        _check(self.init_args)
        self.features, self.pooling, self.causal, self.max_length = features, pooling, causal, max_length
        self.scale = math.sqrt(width)
        self.whole = classes is not None
        self.head_dim = width // heads
        self.embedding = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(features or 0, width, bias)
        self.positions = nn.Embedding(max_length, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, width_ffn, activation, gated, norm, pre_norm, causal, dropout, bias)
            for _ in range(layers)
        )
        self.norm = token_norm(norm, width, bias) if pre_norm else nn.Identity()
        self.head = nn.Linear(width, classes or vocabulary or 0, bias)
        if tied:
            self.head.weight = self.embedding.weight
        _initialise(self, gain(activation) if init == "own" else math.sqrt(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, classes], or [B, L, vocabulary] of a language model.

        Args:
            input_ids: Tokens, int64 [B, L]; or numbers, float [B, L, features], which may be anything at padding.
            attention_mask: 1 where a position is real and 0 where it is padding, [B, L]; None if all are real.

        Raises:
            ValueError: If they have another form, or are longer than learned positions are.
        """
        self._check_inputs(input_ids, attention_mask)
        real = None if attention_mask is None else attention_mask != 0
        if real is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        else:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        x = self._embedded(input_ids, real)
        rotary = None
        if self.positions is None:
            rotary = rotary_embedding(positions, self.head_dim, x.dtype)
        else:
            x = x + self.positions(positions) * self.scale
        x = self.dropout(x)
        mask = None if real is None else pairwise_attention_mask(real, self.causal)
        for layer in self.layers:
            x = layer(x, mask, rotary)
        x = self.norm(x)
        return self.head(self._pooled(x, real) if self.whole else x)

    def _embedded(self, inputs: Tensor, real: Tensor | None) -> Tensor:
        if self.features is None:
            return self.embedding(inputs) * self.scale
        return self.embedding(inputs if real is None else inputs.masked_fill(~real[..., None], 0.0))

    def _pooled(self, x: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return x.mean(1) if self.pooling == "mean" else x[:, 0]
        if self.pooling == "mean":
            return pool(x, real)
        return x[torch.arange(x.shape[0], device=x.device), real.long().argmax(1)]

    def _check_inputs(self, inputs: Tensor, mask: Tensor | None) -> None:
        shapes = f"inputs are {inputs.dtype} {list(inputs.shape)}"
        if self.features is None:
            if inputs.is_floating_point() or inputs.dim() != 2:
                raise ValueError(f"{shapes}: give tokens, int64 [B, L].")
        elif not inputs.is_floating_point() or inputs.dim() != 3 or inputs.shape[2] != self.features:
            raise ValueError(f"{shapes}: give numbers, float [B, L, {self.features}].")
        if self.positions is not None and inputs.shape[1] > self.max_length:
            raise ValueError(
                f"{shapes}, longer than max_length={self.max_length}: cut them, or build with a larger one."
            )
        if mask is not None and mask.shape != inputs.shape[:2]:
            raise ValueError(f"{shapes}, attention_mask {list(mask.shape)}: give one number a position.")


def _check(arguments: dict[str, Any]) -> None:
    """Raise ValueError for what no transformer can be built with."""
    vocabulary, features, classes = arguments["vocabulary"], arguments["features"], arguments["classes"]
    if (vocabulary is None) == (features is None):
        raise ValueError(f"vocabulary={vocabulary}, features={features}: give one, for tokens or for series.")
    names = ("vocabulary", "features", "classes", "width", "layers", "heads", "width_ffn", "max_length")
    if low := [f"{name}={arguments[name]}" for name in names if arguments[name] is not None and arguments[name] < 1]:
        raise ValueError(f"{', '.join(low)}: must be at least 1.")
    if vocabulary is None and classes is None:
        raise ValueError(f"features={features}, classes=None: give classes; only a vocabulary can be modelled.")
    if arguments["tied"] and classes is not None:
        raise ValueError(f"tied=True, classes={classes}: only a language model's output can be its embedding.")
    if arguments["width"] % arguments["heads"]:
        raise ValueError(
            f"width={arguments['width']}, heads={arguments['heads']}: give a number of heads that divides it."
        )
    if arguments["positions"] == "rotary" and arguments["width"] // arguments["heads"] % 2:
        raise ValueError(
            f"width={arguments['width']}, heads={arguments['heads']}: rotary positions need heads of an even width."
        )
    if not 0 <= arguments["dropout"] < 1:
        raise ValueError(f"dropout={arguments['dropout']}: give at least 0 and less than 1.")
    for name, kind in (("norm", TokenNorm), ("positions", Positions), ("pooling", Pooling), ("init", Init)):
        check_choice(kind, **{name: arguments[name]})


@torch.no_grad()
def _initialise(model: Transformer, hidden: float) -> None:
    """Draw weights, see `Transformer`; ``hidden`` is the gain of what reads an activation."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    branches = 2 * len(model.layers)
    for layer in model.layers:
        assert isinstance(layer, TransformerLayer)
        layer.feed_forward.down.weight.mul_(hidden)
        if layer.pre_norm:
            layer.attention.output.weight.div_(math.sqrt(branches))
            layer.feed_forward.down.weight.div_(math.sqrt(branches))
