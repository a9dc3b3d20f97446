"""Means and differences over seeds or samples: made by :mod:`workbench.evaluation.statistics`, kept in records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        n: Seeds.
        mean: Over them.
        deviation: The sample's, over n - 1; None of one seed.
        interval: The mean's; None where n does not allow one.
    """

    n: int | None
    mean: float
    deviation: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Paired:
    """Differences a - b within pairs, as of seeds.

    Attributes:
        n: Pairs.
        mean: Of the differences.
        deviation: Of the differences, the sample's, over n - 1.
        interval: Paired t interval of the mean.
        p: Two-sided paired t test.
        p_sign_flip: Two-sided exact sign-flip test; None beyond 24 pairs. No less than 2^(1 - n).
        effect: d_z = mean / deviation.
    """

    n: int | None
    mean: float
    deviation: float | None
    interval: Interval | None
    p: float | None
    p_sign_flip: float | None
    effect: float | None


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests at level alpha.

    Attributes:
        n: Pairs.
        margin: How far apart the means may be, in the unit of the differences, above 0.
        p: The larger p of the two.
        interval: Of the mean difference, with confidence 1 - 2 alpha.
        equivalent: Whether the interval lies within +- margin.
    """

    n: int | None
    margin: float
    p: float | None
    interval: Interval | None
    equivalent: bool


@dataclass(frozen=True)
class AccuracyDifference:
    """Of two classifiers' accuracies on the same samples, the first's less the second's.

    Attributes:
        n: Samples, or positions in them.
        gained: Right by the first alone.
        lost: Right by the second alone.
        difference: (gained - lost) / n, in [-1, 1].
        interval: Of the difference.
        p: Two-sided.
        method: Of interval and test, in words.
        p_holm: ``p`` adjusted for the number of comparisons.
    """

    n: int | None
    gained: int | None
    lost: int | None
    difference: float | None
    interval: Interval | None
    p: float | None
    method: str
    p_holm: float | None
