"""Schedules: the density at each level or moment, and how many weights a density keeps.

A density is read as the decimal that it was written as (its ``repr``) and computed exactly: in binary,
0.07 of 100 is above 7 and 0.29 of 100 below 29, so a ceiling would keep 8 and a floor 28.
"""

import math
from fractions import Fraction


def check_density(density: float) -> Fraction:
    """The density as the decimal it was written as.

    Raises:
        ValueError: unless 0 < density <= 1.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:  # also refuses NaN
        raise ValueError(f"density is {density!r}: give the share of weights to keep, above 0 and at most 1")
    return Fraction(repr(float(density)))


def kept(total: int, density: float) -> int:
    """Number of weights that ``density`` keeps out of ``total``: the one definition of "exactly k".

    k = floor(total * density + 1/2), in exact arithmetic: halves always go up. Python's ``round`` would send
    them to the even neighbour, and a chain of levels with them. k never grows when the density falls, and is
    ``total`` at density 1.

    Args:
        total: the *original* number of weights, at every level; never the number that the last level left.
        density: share to keep, in (0, 1].

    Raises:
        ValueError: if ``density`` is outside (0, 1] or ``total`` is negative.
    """
    if total < 0:
        raise ValueError(f"total is {total}, but it counts weights: give the original number, 0 or more")
    return math.floor(total * check_density(density) + Fraction(1, 2))


def geometric(rate: float, levels: int) -> list[float]:
    """Densities of iterative pruning that removes a share ``rate`` of the remaining weights at every level.

    Formula: density[level] = (1 - rate) ** level for level = 0 (dense) to ``levels``, so the list is indexed by level
    and has ``levels + 1`` entries. Each is computed from the first and rounded once.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635.

    When to use: lottery tickets.

    Args:
        rate: share removed per level, in [0, 1); 0 prunes nothing, the control for rewinding.
        levels: how many times to prune, 0 or more.

    Raises:
        ValueError: if either is out of range, or a density would be too small for a float.
    """
    if levels < 0:
        raise ValueError(f"levels is {levels}, but it counts prunings: give 0 or more")
    remaining = 1 - _check_rate(rate)
    densities = [float(remaining**level) for level in range(levels + 1)]
    if densities[-1] == 0:
        raise ValueError(f"{levels} levels at rate {rate} leave nothing: give fewer levels or a lower rate")
    return densities


def cubic(progress: float, density: float, initial: float = 1.0) -> float:
    """From ``initial`` to ``density``, fast while many weights are redundant, then slower.

    Formula: d(p) = d_f + (d_i - d_f) (1 - p)^3 with p = (t - t_0) / (n dt), which is the paper's
    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 written for densities d = 1 - s. Computed exactly and rounded
    once: it is ``initial`` at 0, ``density`` at 1, and never grows in between.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.

    When to use: the default of gradual pruning.

    Args:
        progress: p, in [0, 1].
        density: d_f, in (0, 1].
        initial: d_i, in [density, 1].

    Raises:
        ValueError: if an argument is out of range.
    """
    done, last, first = _check_progress(progress, density, initial)
    return float(last + (first - last) * (1 - done) ** 3)


def linear(progress: float, density: float, initial: float = 1.0) -> float:
    """From ``initial`` to ``density`` at a constant speed. Arguments, ends and errors as in :func:`cubic`.

    Formula: d(p) = d_i + (d_f - d_i) p.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878 (the exponent 1 of equation 1).

    When to use: as the baseline for cubic, or if training is too short to recover from fast pruning early on.
    """
    done, last, first = _check_progress(progress, density, initial)
    return float(first + (last - first) * done)


def exponential(progress: float, density: float, initial: float = 1.0) -> float:
    """The same share of the remaining weights in equal times, as :func:`geometric` levels do.

    Arguments, ends and errors as in :func:`cubic`.

    Formula: d(p) = d_i (d_f / d_i)^p.

    Source: Tanaka et al., Pruning neural networks without any data, 2020, arXiv:2006.05467, algorithm 1.

    When to use: to very low densities, and for criteria that prune in rounds (``synflow``).
    """
    done, last, first = _check_progress(progress, density, initial)
    if done in (0, 1):
        return float(last if done else first)
    return min(float(first), max(float(last), float(first) * float(last / first) ** float(done)))


def one_shot(progress: float, density: float, initial: float = 1.0) -> float:
    """``density`` from the first step on. Arguments and errors as in :func:`cubic`.

    Formula: d(p) = d_f.

    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019, arXiv:1810.02340.

    When to use: for pruning at initialisation, or as the baseline.
    """
    _, last, _ = _check_progress(progress, density, initial)
    return float(last)


SCHEDULES = {"one_shot": one_shot, "cubic": cubic, "geometric": exponential, "linear": linear}


def levels_to(density: float, rate: float) -> int:
    """Number of levels until ``density`` is reached: the smallest n with (1 - rate) ** n <= density.

    The comparison has a tolerance of 10^-9 of a level, so that a density computed by ``geometric`` gives its level.

    Raises:
        ValueError: if ``density`` is outside (0, 1], ``rate`` outside [0, 1), or the rate is 0 and the
            density below 1.
    """
    check_density(density)
    if not _check_rate(rate):
        if density < 1:
            raise ValueError(f"a rate of 0 never reaches density {density}: give a rate above 0")
        return 0
    return max(0, math.ceil(math.log(density) / math.log1p(-rate) - 1e-9))


def _check_progress(progress: float, density: float, initial: float) -> tuple[Fraction, Fraction, Fraction]:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress!r}: give the share of the way that is done, from 0 to 1")
    last, first = check_density(density), check_density(initial)
    if first < last:
        raise ValueError(f"initial density {initial!r} is below the final one, {density!r}: pruning only removes")
    return Fraction(progress), last, first


def _check_rate(rate: float) -> Fraction:
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate!r}: give the share pruned per level, from 0 to below 1")
    return Fraction(repr(float(rate)))
