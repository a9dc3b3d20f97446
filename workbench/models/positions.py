"""Which positions of a batch of token sequences count, and the shift of a causal model. Imports torch only."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of positions that do not count, by the habit of torch and transformers."""


def tokens_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch are none of its padding, by its ``attention_mask``: bool [B, L]; None without one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def shift(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Line a causal model up with what it predicts: position i of its output with token i + 1.

    Args:
        outputs: Logits or hidden states [B, L, ...].
        labels: Tokens, or labels of tokens, [B, L].

    Returns:
        ``outputs[:, :-1]`` and ``labels[:, 1:]``.

    Raises:
        ValueError: If the two have not the same [B, L].
    """
    if labels.ndim != 2 or outputs.shape[:2] != labels.shape:
        raise ValueError(
            f"outputs are {list(outputs.shape)} and labels {list(labels.shape)}: give [B, L, ...] and [B, L], "
            "both before the shift"
        )
    return outputs[:, :-1], labels[:, 1:]


def valid_tokens(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    ignore_index: int = IGNORED,
    causal: bool = True,
) -> Tensor:
    """Where a prediction counts: its token is real, not ignored and not part of the prompt.

    Only the attention mask marks padding, never a token's number: where the padding token is the end token
    too, the true end still counts. In a causal model the position that predicts must be real as well, which leaves out
    the first token after padding on the left.

    Args:
        tokens: Labels or input ids, [B, L].
        attention_mask: 1 where a token is real and 0 where it is padding, on either side, [B, L]; None if all are real.
        prompt_lengths: Real tokens at the beginning of each sequence that the model was given, [B]; None if none.
        ignore_index: Label of positions that do not count.
        causal: The answer is for shifted labels.

    Returns:
        Bool [B, L - 1] if causal, else [B, L].

    Raises:
        ValueError: If shapes do not fit.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens are {list(tokens.shape)}: give [B, L]")
    valid, real = tokens != ignore_index, torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} for tokens {list(tokens.shape)}: "
                "give one entry a token"
            )
        real = attention_mask != 0
    if prompt_lengths is not None:
        if prompt_lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"prompt_lengths is {list(prompt_lengths.shape)} for tokens {list(tokens.shape)}: "
                f"give one length a sequence, [{len(tokens)}]"
            )
        valid = valid & (real.cumsum(1) > prompt_lengths.to(tokens.device)[:, None])
    valid = valid & real
    return valid[:, 1:] & real[:, :-1] if causal else valid
