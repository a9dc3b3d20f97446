"""What differences are worth: intervals, exact tests, corrections and equivalence. Pure functions of a few numbers.

Two kinds of n. Over *seeds*: `mean`, `paired`, `equivalence`, for what another training would give; the same seed gives
both arms the same start and data order, so compare within seeds. Over *samples* of one test set: `mcnemar` and
`clustered`, for another test set on the same two networks; they do not cover seeds.

A value that n does not allow, such as an interval from one seed, is None.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from workbench.records.estimates import AccuracyDifference, Equivalence, Estimate, Interval, Paired

CONFIDENCE = 0.95
_EXACT = 24  # pairs up to which all sign flips are gone through: 2^23 sums


def mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean and its t interval, mean +- t_{n-1} s / sqrt(n); no interval of one value, nor of values all the same.

    Raises:
        ValueError: If there is no value, one is not finite, or the confidence is not between 0 and 1.
    """
    x = _checked(values)
    return _mean(x, float(np.abs(x).max()), _level(confidence, "confidence"))


def negated(estimate: Estimate) -> Estimate:
    """The mean of the negated values."""
    interval = estimate.interval
    turned = None if interval is None else Interval(-interval.high, -interval.low, interval.confidence)
    return Estimate(estimate.n, -estimate.mean, estimate.deviation, turned)


def paired(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """The differences first - second: t interval, t test, exact sign-flip test, effect size.

    Differences that are all the same have no spread to judge them by: interval, t test and effect are then None.

    Raises:
        ValueError: If the lengths differ, there is no pair, a value is not finite, or the confidence is not in (0, 1).
    """
    d, scale = _differences(first, second)
    estimate = _mean(d, scale, _level(confidence, "confidence"))
    flips = sign_flip(d.tolist()) if len(d) <= _EXACT else None
    if estimate.interval is None or not estimate.deviation:
        return Paired(len(d), estimate.mean, estimate.deviation, None, None, flips, None)
    t = estimate.mean / (estimate.deviation / math.sqrt(len(d)))
    p = 2 * float(stats.t.sf(abs(t), len(d) - 1))
    return Paired(
        len(d), estimate.mean, estimate.deviation, estimate.interval, p, flips, estimate.mean / estimate.deviation
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided exact sign-flip test: the share of all 2^n sign patterns whose |sum| is at least the one seen.

    It takes the differences to be symmetric about 0 if nothing is the matter, and no more. With n pairs p is at least
    2^(1 - n), so five seeds cannot reach .05.

    Raises:
        ValueError: If there is none, more than 24, or one is not finite.

    Source: Fisher 1935, "The design of experiments", section 21.
    """
    d = _checked(differences)
    if len(d) > _EXACT:
        raise ValueError(f"{len(d)} pairs have 2^{len(d)} sign patterns: exact up to {_EXACT}, use paired().p beyond")
    sums = d[:1]  # the first sign is fixed: a pattern and its mirror image have the same |sum|
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: the chance that any of them is falsely below a level is at most the level.

    Raises:
        ValueError: If one is not in [0, 1].

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6(2).
    """
    if bad := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p value {bad[0]}: give numbers from 0 to 1")
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def holm_exclusive(pairs: Sequence[tuple[float | None, float | None]]) -> list[tuple[float | None, float | None]]:
    """Holm over pairs of hypotheses of which at most one is true: no difference, and a difference beyond a margin.

    The number of hypotheses that may still be true is that of the pairs with one not yet rejected: half of what Holm
    would take. The chance of any false rejection, of either kind, is at most the level.

    Args:
        pairs: p of the two; None for one that is not tested.

    Returns:
        Adjusted p values, in that order.

    Raises:
        ValueError: If one is not in [0, 1].

    Source: Shaffer 1986, "Modified sequentially rejective multiple test procedures", J. Am. Stat. Assoc. 81(395).
    """
    tested = {(index, side): p for index, pair in enumerate(pairs) for side, p in enumerate(pair) if p is not None}
    holm(list(tested.values()))  # refuses what is no p value
    adjusted: dict[tuple[int, int], float] = {}
    least = 0.0
    for each in sorted(tested, key=lambda key: tested[key]):
        possible = len({index for index, side in tested if (index, side) not in adjusted})
        least = max(least, min(1.0, possible * tested[each]))
        adjusted[each] = least
    return [(adjusted.get((index, 0)), adjusted.get((index, 1))) for index in range(len(pairs))]


def fixed_sequences(chains: Sequence[Sequence[float | None]], alpha: float = 0.05) -> list[list[float | None]]:
    """The level at which each hypothesis is tested, where each chain is tested in order and ends at its first failure.

    Chains share ``alpha`` equally; one that is rejected to its end leaves its share to the others. The chance of any
    false rejection is at most ``alpha``. Of chains of one hypothesis each this is Holm, of one chain each hypothesis is
    tested at ``alpha``.

    Args:
        chains: p values in the order of testing; None, as of a single seed, is a failure.
        alpha: In (0, 1).

    Returns:
        For each hypothesis the level, at or below which its p is a rejection; None if its chain ended before.

    Raises:
        ValueError: If a p value is not in [0, 1], or alpha not in (0, 1).

    Source: Maurer, Hothorn, Lehmacher 1995, "Multiple comparisons in drug clinical trials and preclinical assays:
    a-priori ordered hypotheses"; Bretz, Maurer, Brannath, Posch 2009, Stat. Med. 28(4), for several chains.
    """
    _level(alpha, "alpha")
    holm([p for chain in chains for p in chain if p is not None])  # refuses what is no p value
    levels: list[list[float | None]] = [[None] * len(chain) for chain in chains]
    open_ = [index for index, chain in enumerate(chains) if chain]
    share = dict.fromkeys(open_, alpha / max(1, len(open_)))
    place = dict.fromkeys(open_, 0)
    moved = True
    while moved:
        moved = False
        for index in list(open_):
            p = chains[index][place[index]]
            levels[index][place[index]] = share[index]
            if p is None or p > share[index]:
                continue
            moved, place[index] = True, place[index] + 1
            if place[index] == len(chains[index]):
                open_.remove(index)
                for other in open_:
                    share[other] += share[index] / len(open_)
    return levels


def equivalence(
    first: Sequence[float], second: Sequence[float], margin: float = 0.005, alpha: float = 0.05
) -> Equivalence:
    """Whether the mean difference is within +- margin: two one-sided paired t tests, the larger p.

    Differences that are all the same, as those of one pair, show neither: p is then None.

    Raises:
        ValueError: As `paired`; or if the margin is not positive or alpha not in (0, 0.5).

    Source: Schuirmann 1987, J. Pharmacokinet. Biopharm. 15(6).
    """
    d, scale = _differences(first, second)
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin is {margin}: give a positive number, in the units of the differences")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}: give a number between 0 and 0.5")
    estimate = _mean(d, scale, 1 - 2 * alpha)
    if estimate.interval is None or not estimate.deviation:
        return Equivalence(len(d), margin, None, None, False)
    error = estimate.deviation / math.sqrt(len(d))
    p = float(stats.t.sf((margin - abs(estimate.mean)) / error, len(d) - 1))
    return Equivalence(len(d), margin, p, estimate.interval, p <= alpha)


def one_sided(pairs: Paired, bound: float = 0.0) -> float | None:
    """One-sided p of the paired t test whose null is a mean difference of at most ``bound``; None without spread.

    At ``bound = -margin`` it tests non-inferiority: that the first is worse by less than the margin.
    """
    if not pairs.deviation or pairs.n is None or pairs.n < 2:
        return None
    return float(stats.t.sf((pairs.mean - bound) / (pairs.deviation / pairs.n**0.5), pairs.n - 1))


def mcnemar(gained: int, lost: int, n: int, confidence: float = CONFIDENCE) -> AccuracyDifference:
    """Two classifiers on n independent samples: exact McNemar test, and an interval of the difference.

    The null hypothesis: a sample that only one of them gets right is either's with equal chance. The
    interval is the adjusted Wald one: with p1 = (gained + 1) / (n + 2) and p2 = (lost + 1) / (n + 2),
    p1 - p2 +- z sqrt((p1 + p2 - (p1 - p2)^2) / (n + 2)).

    Args:
        gained: Samples that only the first has right.
        lost: Samples that only the second has right.
        n: Samples in all.
        confidence: Of the interval.

    Raises:
        ValueError: If counts are negative or gained + lost exceeds n, n is 0, or the confidence is not in (0, 1).

    Source: McNemar 1947, Psychometrika 12(2); Bonett and Price 2012, J. Educ. Behav. Stat. 37(4).
    """
    _check_counts(gained, lost, n)
    z = float(stats.norm.ppf((1 + _level(confidence, "confidence")) / 2))
    p1, p2 = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    interval = Interval(max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half), confidence)
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return AccuracyDifference(
        n, gained, lost, (gained - lost) / n, interval, p, "exact McNemar test, adjusted Wald interval", None
    )


def clustered(
    gained: Sequence[int], lost: Sequence[int], sizes: Sequence[int], confidence: float = CONFIDENCE
) -> AccuracyDifference:
    """Two classifiers on positions that come in groups, such as the tokens of a text: t interval and test over groups.

    D = sum_g (gained_g - lost_g) / sum_g n_g, with the error of a ratio over G groups,
    sqrt(G / (G - 1) sum_g (gained_g - lost_g - D n_g)^2) / sum_g n_g, and G - 1 degrees of freedom. Positions of one
    group may depend on each other in any way; with fewer than two groups, or no spread, there is no interval.

    Args:
        gained: Of each group, positions that only the first has right.
        lost: Of each group, positions that only the second has right.
        sizes: Of each group, positions in all; a group without any is no group.
        confidence: Of the interval.

    Raises:
        ValueError: As `mcnemar`, for any group; if the lengths differ.

    Source: Cochran 1977, "Sampling techniques", section 2.11 (ratio estimator).
    """
    _level(confidence, "confidence")
    if not len(gained) == len(lost) == len(sizes):
        raise ValueError(f"{len(gained)}, {len(lost)} and {len(sizes)} groups: give the three of each")
    groups = [group for group in zip(gained, lost, sizes) if group[2] or group[0] or group[1]]
    for group in groups:
        _check_counts(*group)
    more, less, n = (np.array([group[i] for group in groups], dtype=np.int64) for i in range(3))
    total, count = int(n.sum()), len(groups)
    _check_counts(int(more.sum()), int(less.sum()), total)
    value = int((more - less).sum()) / total
    interval, p = None, None
    spread = float(np.square(more - less - value * n).sum())
    if count > 1 and spread > 0:
        error = math.sqrt(count / (count - 1) * spread) / total
        interval = _t_interval(value, error, count - 1, confidence)
        p = 2 * float(stats.t.sf(abs(value) / error, count - 1))
    return AccuracyDifference(
        total, int(more.sum()), int(less.sum()), value, interval, p, f"t test and interval over {count} sequences", None
    )


def _mean(x: np.ndarray, scale: float, confidence: float) -> Estimate:
    """Mean of values that are exact to rounding at ``scale``: a deviation below that is none."""
    centre = float(x.mean())
    if len(x) == 1:
        return Estimate(1, centre, None, None)
    spread = float(x.std(ddof=1))
    if spread <= 1e-14 * scale:
        return Estimate(len(x), centre, 0.0, None)
    return Estimate(len(x), centre, spread, _t_interval(centre, spread / math.sqrt(len(x)), len(x) - 1, confidence))


def _t_interval(centre: float, error: float, freedom: int, confidence: float) -> Interval:
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    return Interval(centre - half, centre + half, confidence)


def _checked(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"values have shape {list(x.shape)}: give one number per seed, at least one")
    if not np.isfinite(x).all():
        raise ValueError(f"values hold {x[~np.isfinite(x)][0]}: a run that failed must be dealt with before, not here")
    return x


def _differences(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, float]:
    """Of the pairs, and the largest number that they were made of."""
    a, b = _checked(first), _checked(second)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs: give both arms for the same seeds, in one order")
    return a - b, float(max(np.abs(a).max(), np.abs(b).max()))


def _level(value: float, name: str) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}: give a number between 0 and 1, such as 0.95")
    return value


def _check_counts(gained: int, lost: int, n: int) -> None:
    if min(gained, lost) < 0 or n < 1 or gained + lost > n:
        raise ValueError(f"gained {gained}, lost {lost} of n = {n}: give counts whose sum is at most n, n at least 1")
