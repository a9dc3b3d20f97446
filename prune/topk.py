"""Exactly k of many scores: the highest, ties by index."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune.masks.memory import distributed, gathered, local, owners, shard, summed

# Scores looked at in one go, so that little memory is needed. On a CPU they fit its cache, and are fewer than torch
# divides among threads: that is as fast as larger pieces with two threads, and does not wait for threads that are busy.
_CHUNK = 2**15 - 64
_BINS = 2**16
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def keep_top_k(scores: Mapping[str, Tensor], k: int, within: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks that keep exactly the ``k`` highest scores among all tensors together.

    Equal scores are taken by index: the parameter that comes first in ``scores``, then the lower flat index.
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
            not looked at.

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
        raise ValueError(f"cannot keep {k} of {candidates} candidates: ask for 0 to {candidates}")
    wide = any(score.dtype == torch.float64 for score in scores.values())
    dtype = torch.float64 if wide else torch.float32
    threshold, places, tied = _threshold(parts, k, dtype)
    every = places == tied
    masks = {}
    for part in parts:
        mask = torch.empty(part.score.shape, dtype=torch.bool, device=part.values.device)
        chunks = mask.view(-1).split(_chunk(mask))
        for chunk, found in zip(chunks, _found(part, dtype, torch.ge if every else torch.gt, threshold)):
            chunk.copy_(found)
        if not every and places:
            places -= _admit(chunks, _found(part, dtype, torch.eq, threshold), places)
        masks[part.name] = mask
    return masks


class _Part(NamedTuple):
    """What this rank looks at of one tensor's scores."""

    name: str
    score: Tensor
    values: Tensor
    alive: Tensor | None
    candidates: int

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flat pieces of scores, in ``dtype``, and of candidates."""
        flat, size = self.values.flatten(), _chunk(self.values)
        for start in range(0, len(flat), size):
            piece = slice(start, start + size)
            yield flat[piece].to(dtype), None if self.alive is None else self.alive[piece]


def _chunk(values: Tensor) -> int:
    return _CHUNK if values.device.type == "cpu" else 128 * _CHUNK


def _part(name: str, score: Tensor, within: Mapping[str, Tensor] | None) -> _Part:
    if not score.is_floating_point():
        raise ValueError(f"scores of '{name}' are {score.dtype}: give floating-point scores")
    if within is None:
        return _Part(name, score, local(score), None, score.numel())
    if name not in within or within[name].shape != score.shape:
        given = f"has shape {tuple(within[name].shape)} there" if name in within else "is missing there"
        raise ValueError(f"`within` does not fit: '{name}' {given}, its scores have shape {tuple(score.shape)}")
    alive = shard(within[name], score).flatten()
    return _Part(name, score, local(score), alive, int(within[name].sum()))


def _threshold(parts: list[_Part], k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The key of the k-th highest score, how many that equal it are to be kept, and how many equal it."""
    key, want, tied = None, k, 0
    for shift in range(torch.finfo(dtype).bits - 16, -1, -16):
        counts = _counts(parts, dtype, shift, key)
        if key is None:
            _refuse_nan(parts, counts, dtype)
        highest = counts.flip(0).cumsum(0)
        skipped = int(torch.searchsorted(highest, want))
        digit = _BINS - 1 - skipped
        tied = int(counts[digit])
        want -= int(highest[skipped]) - tied
        key = digit - _BINS // 2 if key is None else key << 16 | digit
    assert key is not None
    return key, want, tied


def _counts(parts: list[_Part], dtype: torch.dtype, shift: int, prefix: int | None) -> Tensor:
    """How many keys have each value of the 16 bits from ``shift`` on, of those whose higher bits are ``prefix``."""
    counts: dict[tuple[Any, ...], Tensor] = {}
    for part in parts:
        where = (part.values.device, owners(part.score))
        if where not in counts:
            counts[where] = torch.zeros(_BINS, dtype=torch.int64, device=part.values.device)
        one = counts[where].new_ones(())
        for values, alive in part.chunks(dtype):
            keys = _keys(values, alive)
            if prefix is None:
                digits = (keys >> shift).add_(_BINS // 2)
            else:
                digits = (keys[keys >> (shift + 16) == prefix] >> shift).bitwise_and_(_BINS - 1)
            counts[where].index_add_(0, digits, one.expand(len(digits)))
    return torch.stack([summed(total, groups).cpu() for (_, groups), total in counts.items()]).sum(0)


def _keys(values: Tensor, alive: Tensor | None) -> Tensor:
    """Integers in the order of the floats, zeros of both signs equal; the lowest one, which no float has, where dead.

    The bits of a positive float are in its order already, those of a negative one count downwards from the lowest
    integer.
    """
    bits = values.view(_INTEGER[values.dtype])
    lowest = torch.iinfo(bits.dtype).min
    if bits.min() < 0:
        bits = torch.where(bits < 0, lowest - bits, bits)
    return bits if alive is None else bits.masked_fill(~alive, lowest)


def _refuse_nan(parts: list[_Part], counts: Tensor, dtype: torch.dtype) -> None:
    """Counts by the highest 16 bits tell whether there is anything infinite or NaN, and only then it is looked for."""
    infinity = int(_keys(torch.tensor([torch.inf], dtype=dtype), None)) >> (torch.finfo(dtype).bits - 16)
    middle = _BINS // 2
    dead = sum(part.score.numel() - part.candidates for part in parts)
    if int(counts[middle + infinity :].sum() + counts[: middle - infinity + 1].sum()) == dead:
        return
    for part in parts:
        nan = sum(
            (values.isnan() if alive is None else values.isnan() & alive).sum() for values, alive in part.chunks(dtype)
        )
        bad = int(summed(torch.as_tensor(nan, device=part.values.device), owners(part.score)))
        if bad:
            raise ValueError(
                f"{bad} of {part.score.numel()} scores of '{part.name}' are NaN, so they have no order: "
                "check the weights, or the data that the scores came from"
            )


def _found(part: _Part, dtype: torch.dtype, compare: Callable[..., Tensor], threshold: int) -> Iterator[Tensor]:
    """Where keys of candidates compare so with the threshold: flat pieces of the whole, from every rank."""
    pieces = (compare(_keys(values, alive), threshold) for values, alive in part.chunks(dtype))
    if distributed(part.score):
        none = torch.zeros(0, dtype=torch.bool, device=part.values.device)
        whole = gathered(torch.cat([none, *pieces]).view(part.values.shape), part.score)
        return iter(whole.flatten().split(_chunk(whole)))
    return pieces


def _admit(chunks: tuple[Tensor, ...], tied: Iterator[Tensor], places: int) -> int:
    """Keep the first of what is tied, as many as there are places; how many were taken."""
    left = places
    for chunk, ties in zip(chunks, tied):
        found = ties.nonzero().flatten()[:left]
        chunk[found] = True
        left -= len(found)
        if not left:
            break
    return places - left
