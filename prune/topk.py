"""Exact top k over many tensors: the highest scores, ties by index."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune.masks.memory import distributed, gathered, local, owners, shard, summed

# Scores are read in chunks, to need little memory. On a CPU a chunk fits its cache, and is smaller than what torch
# divides among threads: as fast as larger chunks with two threads, without waiting for busy ones.
_CHUNK = 2**15 - 64
_BINS = 2**16
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def keep_top_k(scores: Mapping[str, Tensor], k: int, within: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks that keep exactly the ``k`` highest scores among all tensors together.

    Ties are broken by index: the parameter that comes first in ``scores``, then the lower flat index.
    Infinite scores are scores like any other. Half-precision scores are compared in fp32.

    The k-th highest is found by a radix histogram: the bits of floats, mapped to integers of the same order, are
    counted by their highest 16, then by the next 16 of those that share them, two passes for fp32, four for fp64.
    Nothing is concatenated or sorted. Of DTensors each rank counts its shard and only the counts are added up; call
    it on every rank of their mesh, and every rank gets the same masks, those that one process would find.

    Args:
        scores: parameter name -> floating scores, any shape; plain tensors, or DTensors of placements Shard and
            Replicate.
        k: how many to keep, from 0 to the number of candidates.
        within: whole masks of the same names and shapes; where they are False nothing is kept and the score is
            ignored.

    Returns:
        Parameter name -> plain, whole bool mask of the scores' shape, on their device, in their order.

    Raises:
        ValueError: if a candidate's score is NaN (naming the parameter), ``within`` does not fit ``scores``,
            or there are fewer than ``k`` candidates.
    """
    if not scores:
        raise ValueError("there are no scores to select from: give at least one tensor")
    parts = [_part(name, score, within) for name, score in scores.items()]
    candidates = sum(part.candidates for part in parts)
    if not 0 <= k <= candidates:
        raise ValueError(f"cannot keep {k} of {candidates} candidates: give 0 to {candidates}")
    wide = any(score.dtype == torch.float64 for score in scores.values())
    dtype = torch.float64 if wide else torch.float32
    threshold, wanted, tied = _threshold(parts, k, dtype)
    keep_all_tied = wanted == tied
    masks = {}
    for part in parts:
        mask = torch.empty(part.score.shape, dtype=torch.bool, device=part.values.device)
        chunks = mask.view(-1).split(_chunk(mask))
        compare = torch.ge if keep_all_tied else torch.gt
        for chunk, above in zip(chunks, _compared(part, dtype, compare, threshold)):
            chunk.copy_(above)
        if not keep_all_tied and wanted:
            wanted -= _keep_first_tied(chunks, _compared(part, dtype, torch.eq, threshold), wanted)
        masks[part.name] = mask
    return masks


class _Part(NamedTuple):
    """This rank's part of one tensor's scores.

    Attributes:
        name: of the parameter.
        score: the whole tensor, plain or a DTensor.
        values: this rank's shard of it.
        allowed: which of the values may be kept, flat; None for all.
        candidates: how many may be kept on all ranks.
    """

    name: str
    score: Tensor
    values: Tensor
    allowed: Tensor | None
    candidates: int

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flat pieces of scores, in ``dtype``, and of candidates."""
        flat, size = self.values.flatten(), _chunk(self.values)
        for start in range(0, len(flat), size):
            piece = slice(start, start + size)
            yield flat[piece].to(dtype), None if self.allowed is None else self.allowed[piece]


def _chunk(values: Tensor) -> int:
    return _CHUNK if values.device.type == "cpu" else 128 * _CHUNK


def _part(name: str, score: Tensor, within: Mapping[str, Tensor] | None) -> _Part:
    if not score.is_floating_point():
        raise ValueError(f"scores of '{name}' are {score.dtype}: give floating-point scores")
    if within is None:
        return _Part(name, score, local(score), None, score.numel())
    if name not in within or within[name].shape != score.shape:
        problem = f"has shape {tuple(within[name].shape)} there" if name in within else "is missing there"
        raise ValueError(f"`within` does not fit: '{name}' {problem}, its scores have shape {tuple(score.shape)}")
    allowed = shard(within[name], score).flatten()
    return _Part(name, score, local(score), allowed, int(within[name].sum()))


def _threshold(parts: list[_Part], k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The key of the k-th highest score, how many of its equals to keep, and how many equals there are."""
    key, wanted, tied = None, k, 0
    for shift in range(torch.finfo(dtype).bits - 16, -1, -16):
        counts = _counts(parts, dtype, shift, key)
        if key is None:
            _refuse_nan(parts, counts, dtype)
        highest = counts.flip(0).cumsum(0)
        skipped = int(torch.searchsorted(highest, wanted))
        digit = _BINS - 1 - skipped
        tied = int(counts[digit])
        wanted -= int(highest[skipped]) - tied
        key = digit - _BINS // 2 if key is None else key << 16 | digit
    assert key is not None
    return key, wanted, tied


def _counts(parts: list[_Part], dtype: torch.dtype, shift: int, prefix: int | None) -> Tensor:
    """How many keys have each value of the 16 bits from ``shift`` on, of those whose higher bits are ``prefix``."""
    counts: dict[tuple[Any, ...], Tensor] = {}
    for part in parts:
        home = (part.values.device, owners(part.score))  # counts of the same ranks are added up in one message
        if home not in counts:
            counts[home] = torch.zeros(_BINS, dtype=torch.int64, device=part.values.device)
        one = counts[home].new_ones(())
        for values, allowed in part.chunks(dtype):
            keys = _keys(values, allowed)
            if prefix is None:
                digits = (keys >> shift).add_(_BINS // 2)
            else:
                digits = (keys[keys >> (shift + 16) == prefix] >> shift).bitwise_and_(_BINS - 1)
            counts[home].index_add_(0, digits, one.expand(len(digits)))
    return torch.stack([summed(total, groups).cpu() for (_, groups), total in counts.items()]).sum(0)


def _keys(values: Tensor, allowed: Tensor | None) -> Tensor:
    """Integers in the order of the floats, zeros of both signs equal; the lowest, which no float has, if not allowed.

    The bits of positive floats are in their order already; those of negative ones count down from the lowest integer.
    """
    bits = values.view(_INTEGER[values.dtype])
    lowest = torch.iinfo(bits.dtype).min
    if bits.min() < 0:
        bits = torch.where(bits < 0, lowest - bits, bits)
    return bits if allowed is None else bits.masked_fill(~allowed, lowest)


def _refuse_nan(parts: list[_Part], counts: Tensor, dtype: torch.dtype) -> None:
    """Refuse NaN. Counts by the highest 16 bits show whether anything is infinite or NaN; only then scores are read."""
    infinity = int(_keys(torch.tensor([torch.inf], dtype=dtype), None)) >> (torch.finfo(dtype).bits - 16)
    middle = _BINS // 2
    excluded = sum(part.score.numel() - part.candidates for part in parts)
    if int(counts[middle + infinity :].sum() + counts[: middle - infinity + 1].sum()) == excluded:
        return
    for part in parts:
        nan = sum(
            (values.isnan() if allowed is None else values.isnan() & allowed).sum()
            for values, allowed in part.chunks(dtype)
        )
        bad = int(summed(torch.as_tensor(nan, device=part.values.device), owners(part.score)))
        if bad:
            raise ValueError(
                f"{bad} of {part.score.numel()} scores of '{part.name}' are NaN, so they have no order: "
                "check the weights, or the data that the scores came from"
            )


def _compared(part: _Part, dtype: torch.dtype, compare: Callable[..., Tensor], threshold: int) -> Iterator[Tensor]:
    """``compare(key, threshold)`` of all candidates: flat chunks of the whole tensor, from every rank."""
    pieces = (compare(_keys(values, allowed), threshold) for values, allowed in part.chunks(dtype))
    if distributed(part.score):
        none = torch.zeros(0, dtype=torch.bool, device=part.values.device)
        whole = gathered(torch.cat([none, *pieces]).view(part.values.shape), part.score)
        return iter(whole.flatten().split(_chunk(whole)))
    return pieces


def _keep_first_tied(chunks: tuple[Tensor, ...], tied: Iterator[Tensor], wanted: int) -> int:
    """Keep the first ``wanted`` of the tied scores; returns how many there were to keep."""
    missing = wanted
    for chunk, ties in zip(chunks, tied):
        first = ties.nonzero().flatten()[:missing]
        chunk[first] = True
        missing -= len(first)
        if not missing:
            break
    return wanted - missing
