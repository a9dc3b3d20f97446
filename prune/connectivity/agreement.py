"""What two masks of one network have in common, and what chance would have made of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune.masks import Masks


@dataclass(frozen=True)
class Agreement:
    """Two masks of the same weights, against masks that keep as much in each layer, but anywhere.

    Attributes:
        weights: How many there are.
        first: How many the first keeps.
        second: How many the second keeps.
        both: How many both keep.
        jaccard: |A and B| / |A or B|, in [0, 1]; 1 if neither keeps any.
        coefficient: The overlap coefficient, |A and B| / min(|A|, |B|), in [0, 1]: 1 if they are nested; 1 if one of
            them keeps none.
        chance: The ``jaccard`` of as many in common as chance gives on average.
        z: How many standard deviations ``both`` is above that; None where chance leaves no choice.
        p: Of so many in common, or more, by chance: exact of one layer (hypergeometric), of several by the normal
            distribution, with a correction for continuity. 0 is less than 1e-300.
    """

    weights: int
    first: int
    second: int
    both: int
    jaccard: float
    coefficient: float
    chance: float
    z: float | None
    p: float


def agreement(first: Masks, second: Masks) -> Agreement:
    """Of all layers together.

    Raises:
        ValueError: If the masks are not for the same parameters.
    """
    return _summed(list(_counts(first, second).values()))


def layer_agreements(first: Masks, second: Masks) -> dict[str, Agreement]:
    """Parameter name -> agreement of its two masks.

    Raises:
        ValueError: If the masks are not for the same parameters.
    """
    return {name: _summed([counts]) for name, counts in _counts(first, second).items()}


def _counts(first: Masks, second: Masks) -> dict[str, tuple[int, int, int, int]]:
    """Parameter name -> weights, kept by the first, by the second, by both."""
    both, others = (first & second).counts(), second.counts()
    return {name: (total, kept, others[name][0], both[name][0]) for name, (kept, total) in first.counts().items()}


def _summed(layers: Sequence[tuple[int, int, int, int]]) -> Agreement:
    total, a, b, both = (sum(column) for column in zip(*layers))
    mean = sum(k * m / n for n, k, m, _ in layers)
    free = [layer for layer in layers if _variance(*layer[:3])]
    deviation = math.sqrt(sum(_variance(*layer[:3]) for layer in free))
    return Agreement(
        total,
        a,
        b,
        both,
        jaccard=_ratio(both, a + b - both),
        coefficient=_ratio(both, min(a, b)),
        chance=_ratio(mean, a + b - mean),
        z=(both - mean) / deviation if free else None,
        p=_exact(*free[0]) if len(free) == 1 else _normal((both - 0.5 - mean) / deviation) if free else 1.0,
    )


def _variance(total: int, a: int, b: int) -> float:
    """Of the hypergeometric distribution."""
    return a * b * (total - a) * (total - b) / (total**2 * (total - 1)) if total > 1 else 0.0


def _exact(total: int, a: int, b: int, both: int) -> float:
    """P(X >= both), where X of ``a`` marked out of ``total`` are among ``b`` drawn."""
    if both <= max(0, a + b - total):
        return 1.0
    x = torch.arange(both, min(a, b) + 1, dtype=torch.float64)
    logs = _choose(a, x) + _choose(total - a, b - x) - _choose(total, torch.tensor(float(b), dtype=torch.float64))
    return min(1.0, math.exp(float(torch.logsumexp(logs, 0))))


def _choose(n: int, k: torch.Tensor) -> torch.Tensor:
    """Logarithm of the binomial coefficient."""
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _normal(z: float) -> float:
    return math.erfc(z / math.sqrt(2)) / 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
