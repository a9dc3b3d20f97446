"""How much two masks of one network have in common, and how much chance would give."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.messages import some


class Counts(NamedTuple):
    """Of one parameter: its weights, and how many of them the first mask keeps, the second, and both."""

    weights: int
    first: int
    second: int
    both: int


@dataclass(frozen=True)
class Overlap:
    """Two masks of the same weights, against masks that keep as much in each layer, but anywhere.

    Attributes:
        layers: Counts of each parameter.
    """

    layers: tuple[Counts, ...]

    @cached_property
    def _total(self) -> Counts:
        return Counts(*(sum(column) for column in zip(*self.layers)))

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self._total.weights

    @property
    def first(self) -> int:
        """Number that the first masks keep."""
        return self._total.first

    @property
    def second(self) -> int:
        """Number that the second masks keep."""
        return self._total.second

    @property
    def both(self) -> int:
        """Number that both keep."""
        return self._total.both

    @property
    def jaccard(self) -> float:
        """``|A and B| / |A or B|``, in [0, 1]; 1 if neither keeps any."""
        return self._jaccard(self.both)

    @property
    def coefficient(self) -> float:
        """The overlap coefficient, ``|A and B| / min(|A|, |B|)``, in [0, 1]: 1 if they are nested or one keeps none."""
        return _ratio(self.both, min(self.first, self.second))

    @property
    def hamming(self) -> float:
        """Normalised Hamming distance: the share of weights that only one of the two keeps, in [0, 1].

        Source: You et al., "Drawing Early-Bird Tickets", 2020, arXiv:1909.11957, section 3.3.
        """
        return (self.first + self.second - 2 * self.both) / self.weights

    @property
    def relative(self) -> float:
        """The Hamming distance, of what masks that keep as much in each layer, but anywhere, have on average.

        0 of the same masks, 1 of unrelated ones on average, more where one avoids the other. With density d in both and
        in every layer, chance has 2 d (1 - d). Masks that leave chance no choice are the same: 0.
        """
        chance = self.first + self.second - 2 * self._expected
        return (self.first + self.second - 2 * self.both) / chance if chance else 0.0

    @property
    def chance(self) -> float:
        """The ``jaccard`` of as many in common as chance gives on average: c / (a + b - c).

        a_l and b_l of the n_l weights of layer l are kept; c = sum of a_l b_l / n_l is what both keep by chance.
        """
        return self._jaccard(self._expected)

    @property
    def z(self) -> float | None:
        """How many standard deviations ``both`` is above chance; None if every layer keeps all or none."""
        return (self.both - self._expected) / self._deviation if self._deviation else None

    @property
    def p(self) -> float:
        """Probability of so many in common, or more, by chance; 0 is less than 1e-300.

        Exact if one layer alone leaves chance a choice (hypergeometric), else by the normal distribution with a
        correction for continuity.
        """
        varying = [layer for layer in self.layers if _variance(layer)]
        if not varying:
            return 1.0
        if len(varying) == 1:
            return _hypergeometric_tail(varying[0])
        return _normal_tail((self.both - 0.5 - self._expected) / self._deviation)

    @property
    def _expected(self) -> float:
        return sum(layer.first * layer.second / layer.weights for layer in self.layers)

    @property
    def _deviation(self) -> float:
        return math.sqrt(sum(map(_variance, self.layers)))

    def _jaccard(self, both: float) -> float:
        return _ratio(both, self.first + self.second - both)


def layer_overlaps(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """Parameter name -> overlap of its two masks.

    Raises:
        ValueError: If the masks are not for the same parameters.
    """
    return {
        name: Overlap((Counts(mask.numel(), int(mask.sum()), int(other.sum()), int((mask & other).sum())),))
        for name, mask, other in paired(first, second)
    }


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Overlap:
    """The overlap of all masks together.

    Raises:
        ValueError: If the masks are not for the same parameters.
    """
    return Overlap(tuple(each.layers[0] for each in layer_overlaps(first, second).values()))


def paired(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and both masks of every parameter, on the device of the first.

    Raises:
        ValueError: If names or shapes differ.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f"the masks are for different parameters, such as "
            f"{some(sorted(first.keys() ^ second.keys()))}: compare masks of one model"
        )
    for name, mask in first.items():
        if mask.shape != second[name].shape:
            raise ValueError(
                f"mask '{name}' has shape {tuple(mask.shape)} here and {tuple(second[name].shape)} there: "
                "compare masks of one model"
            )
        yield name, mask, second[name].to(mask.device)


def _variance(layer: Counts) -> float:
    """Variance of the hypergeometric distribution."""
    n, a, b, _ = layer
    return a * b * (n - a) * (n - b) / (n**2 * (n - 1)) if n > 1 else 0.0


def _hypergeometric_tail(layer: Counts) -> float:
    """P(X >= both), where X of ``first`` marked out of ``weights`` are among ``second`` drawn."""
    n, a, b, both = layer
    if both <= max(0, a + b - n):
        return 1.0
    x = torch.arange(both, min(a, b) + 1, dtype=torch.float64)
    logs = _log_binomial(a, x) + _log_binomial(n - a, b - x)
    logs -= _log_binomial(n, torch.tensor(float(b), dtype=torch.float64))
    return min(1.0, math.exp(float(torch.logsumexp(logs, 0))))


def _log_binomial(n: int, k: Tensor) -> Tensor:
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _normal_tail(z: float) -> float:
    return math.erfc(z / math.sqrt(2)) / 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
