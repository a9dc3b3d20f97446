"""Structures whose units are single weights: any of them, n of every m, or equally many of every output."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from prune.structures.fitting import divide, no_inputs, unordered
from prune.structures.layout import Layout, Tensors, whole
from prune.topk import keep_top_k
from workbench.models.matrices import Matrix


@dataclass(frozen=True)
class Unstructured:
    """Single weights.

    Formula: unit = one weight.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, arXiv:1506.02626.

    When to use: the default, for the highest sparsity at the same accuracy. Speed needs sparse kernels.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight."""
        return Layout({name: weight.shape for name, weight in weights.items()}, {n: [(n, None)] for n in weights})


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` neighbours along the input axis are kept: the best of them, ties by index.

    Formula: unit = one weight; candidates = the n highest scores of every m consecutive inputs. At density n/m all
    candidates are kept; below it they compete as in :class:`Unstructured`. In a convolution neighbours are input
    channels at one position of the kernel. Bilinear layers are not covered.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3; Zhou et al.,
    Learning N:M fine-grained structured sparse neural networks from scratch, 2021, arXiv:2102.04010, equation 1.

    When to use: 2:4 for the sparse tensor cores of NVIDIA GPUs since Ampere.

    Attributes:
        n: how many of a group may be kept, from 1 to below m.
        m: the size of a group.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(f"{self.n}:{self.m} is no N:M structure: keep from 1 to below m of every m, such as 2:4")

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight, of which at most n of every m are candidates.

        Raises:
            ValueError: if m does not divide the inputs of a layer.
        """
        fitting = divide(self, model, weights, no_inputs)
        inputs = {name: matrix.turned_shape()[1] for name, matrix in fitting.matrices.items()}
        if indivisible := {name: count for name, count in inputs.items() if count % self.m}:
            raise ValueError(
                f"{self.n}:{self.m} needs inputs in groups of {self.m}, but these layers have other numbers of them: "
                f"{indivisible}; exclude them, or choose another m"
            )
        rules = {"densest": Fraction(self.n, self.m), "candidates": partial(self._best, fitting.matrices)}
        return fitting.divided(dict.fromkeys(fitting.matrices), **rules)

    def _best(self, matrices: Mapping[str, Matrix], scores: Tensors, unpruned: Tensors | None) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            score = whole(scores[name])
            allowed = _allowed(score, None if unpruned is None else unpruned[name])
            better = _better(self._grouped(matrix, score), self._grouped(matrix, allowed))
            masks[name] = allowed & matrix.back((better < self.n).flatten(-2).movedim(-1, 1))
        return masks

    def _grouped(self, matrix: Matrix, tensor: Tensor) -> Tensor:
        return matrix.turned(tensor).movedim(1, -1).unflatten(-1, (-1, self.m))


@dataclass(frozen=True)
class Balanced:
    """Every output of a layer keeps equally many of its inputs.

    Formula: unit = one weight; weights compete within an output only. A remainder goes, one each, to the outputs with
    the best next scores; an output with fewer left in ``within`` keeps them all. In a convolution an input is one
    weight of a filter.

    Source: Sun et al., A simple and effective pruning approach for large language models (Wanda), 2023,
    arXiv:2306.11695, section 3 (comparison per output).

    When to use: with ``wanda``, and for kernels that need rows of equal length.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each weight, selected output by output.

        Raises:
            ValueError: if it covers none of the weights.
        """
        fitting = divide(self, model, weights, unordered)
        return fitting.divided(dict.fromkeys(fitting.matrices), select=partial(_best_of_outputs, fitting.matrices))


def best_of_rows(scores: Tensor, unpruned: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest scores of every row, and the one that comes next in each; ties by index.

    A row with fewer left keeps them all. Nothing is sorted but the best ``k + 1`` of a row.

    Args:
        scores: floating and not NaN, [rows, n].
        unpruned: bool, [rows, n].
        k: from 0 to n.

    Returns:
        Two bool tensors, [rows, n].
    """
    scores = scores.masked_fill(~unpruned, -torch.inf)
    thresholds = scores.topk(min(k + 1, scores.shape[1]), dim=1).values
    best = torch.zeros_like(unpruned) if k == 0 else _from(scores, unpruned, thresholds[:, k - 1 : k], k)
    if k == scores.shape[1]:
        return best, torch.zeros_like(best)
    return best, _from(scores, unpruned, thresholds[:, k:], k + 1) & ~best


def _from(scores: Tensor, unpruned: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The ``k`` unpruned of every row from the k-th highest score on, [rows, 1], ties by index."""
    above, tied = scores > threshold, (scores == threshold) & unpruned
    wanted = k - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > wanted).any()):
        tied &= tied.cumsum(1) <= wanted
    return above | tied


def _better(scores: Tensor, unpruned: Tensor) -> Tensor:
    """How many unpruned neighbours [..., m] are better, or equal and first: for small m faster than sorting."""
    scores, unpruned = (tensor.movedim(-1, 0).contiguous() for tensor in (scores, unpruned))
    better = torch.zeros_like(scores, dtype=torch.int16)
    for i, (other, counts) in enumerate(zip(scores, unpruned)):
        better[:i] += counts & (other > scores[:i])
        better[i + 1 :] += counts & (other >= scores[i + 1 :])
    return better.movedim(0, -1)


def _best_of_outputs(
    matrices: Mapping[str, Matrix], scores: Tensors, counts: Mapping[str, int], candidates: Tensors | None
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        score, k = whole(scores[name]), counts[name]
        allowed = _allowed(score, None if candidates is None else candidates[name])
        rows = [matrix.turned(tensor).flatten(1) for tensor in (score, allowed)]
        if bool((score.isnan() & allowed).any()):
            keep_top_k({name: score}, k, {name: allowed})  # refuses it
        # Whole ranks are kept while they fit, then the best weights of the next rank: so no output keeps two more than
        # another.
        full, rest = _whole_ranks(rows[1].sum(1), k)
        inputs = matrix.turned_shape()[1:]
        best, following = (matrix.back(each.unflatten(1, inputs)) for each in best_of_rows(*rows, full))
        masks[name] = best
        if rest:
            masks[name] = best | keep_top_k({name: score}, rest, {name: following})[name]
    return masks


def _whole_ranks(left: Tensor, k: int) -> tuple[int, int]:
    """How many of every row fit into ``k`` where rows have so many ``left``, and how many more do."""
    rows_at_rank = len(left) - left.bincount().cumsum(0)[:-1]  # rows that have a weight of rank 0, 1, ...
    up_to = rows_at_rank.cumsum(0)
    full = int((up_to <= k).sum())
    return full, k - (int(up_to[full - 1]) if full else 0)


def _allowed(score: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(score, dtype=torch.bool) if mask is None else mask.to(score.device)
