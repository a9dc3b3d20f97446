"""Exactly k of many scores: the highest, ties by index.

Shape legend: * = any number of batch dimensions, n = weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def keep_top_k(scores: Mapping[str, Tensor], k: int, within: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks that keep exactly the ``k`` highest scores among all tensors together.

    Equal scores are taken by index: the parameter that comes first in ``scores``, then the lower flat index.
    Infinite scores are scores like any other. Half-precision scores are compared in fp32.

    Args:
        scores: parameter name -> floating scores, any shape.
        k: how many to keep, from 0 to the number of candidates.
        within: masks of the same names and shapes; where they are False nothing is kept and the score is not
            looked at.

    Returns:
        Parameter name -> bool mask of the scores' shape, on their device, in their order.

    Raises:
        ValueError: if a candidate's score is NaN (naming the parameter), ``within`` does not fit ``scores``,
            or there are fewer than ``k`` candidates.
    """
    if not scores:
        raise ValueError("there are no scores to select from: give at least one tensor")
    home = next(iter(scores.values())).device
    flat, alive = [], []
    for name, score in scores.items():
        flat.append(_comparable(name, score, within).flatten().to(home))
        if within is not None:
            alive.append(within[name].flatten().to(home))
    mask = top_k_mask(torch.cat(flat), k, torch.cat(alive) if alive else None)
    parts = mask.split([score.numel() for score in scores.values()])
    return {n: part.view(s.shape).to(s.device, copy=True) for (n, s), part in zip(scores.items(), parts)}


def top_k_mask(scores: Tensor, k: int, alive: Tensor | None = None) -> Tensor:
    """Exactly the ``k`` highest scores along the last dimension, ties to the lower index; batched over the
    others.

    Args:
        scores: floating [*, n] without NaN where alive.
        k: from 0 to the number of candidates in every row.
        alive: bool [*, n], the candidates; None for all.

    Returns:
        bool [*, n] with exactly ``k`` True in every row.

    Raises:
        ValueError: if a row has fewer than ``k`` candidates.
    """
    count = scores.shape[-1]
    fewest = count if alive is None else int(alive.sum(-1).min())
    if not 0 <= k <= fewest:
        raise ValueError(f"cannot keep {k} of {fewest} candidates: ask for 0 to {fewest}")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if alive is not None:
        # A candidate at -inf ties with what is not one, but there are always enough candidates to fill k
        # places.
        scores = scores.masked_fill(~alive, -torch.inf)
    threshold = scores.kthvalue(count - k + 1, dim=-1, keepdim=True).values
    above, tied = scores > threshold, scores == threshold
    if alive is not None:
        tied &= alive
    places = k - above.sum(-1, keepdim=True)
    rank = tied.cumsum(-1, dtype=torch.int32 if count < 2**31 else torch.int64)
    return above | (tied & (rank <= places))


def _comparable(name: str, score: Tensor, within: Mapping[str, Tensor] | None) -> Tensor:
    if not score.is_floating_point():
        raise ValueError(f"scores of '{name}' are {score.dtype}: give floating-point scores")
    if within is not None and (name not in within or within[name].shape != score.shape):
        given = f"has shape {tuple(within[name].shape)} there" if name in within else "is missing there"
        raise ValueError(f"`within` does not fit: '{name}' {given}, its scores have shape {tuple(score.shape)}")
    nan = score.isnan() if within is None else score.isnan() & within[name].to(score.device)
    if nan.any():
        raise ValueError(
            f"{int(nan.sum())} of {score.numel()} scores of '{name}' are NaN, so they have no order: "
            "check the weights, or the data that the scores came from"
        )
    return score if score.dtype == torch.float64 else score.float()
