import itertools
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as theirs

from workbench.evaluation import statistics

A = [0.981, 0.974, 0.979, 0.983, 0.970, 0.977]
B = [0.972, 0.975, 0.971, 0.969, 0.968, 0.970]


def test_mean_and_its_interval_are_scipys():
    found = statistics.mean(A)
    low, high = theirs.t.interval(0.95, 5, loc=np.mean(A), scale=theirs.sem(A))
    assert (found.n, found.mean, found.deviation) == (6, pytest.approx(np.mean(A)), pytest.approx(np.std(A, ddof=1)))
    assert found.interval == statistics.Interval(pytest.approx(low), pytest.approx(high), 0.95)
    wider = statistics.mean(A, 0.99).interval
    assert wider is not None
    assert wider.low < low


def test_paired_is_scipys_ttest_rel():
    found, peer = statistics.paired(A, B), theirs.ttest_rel(A, B)
    interval = peer.confidence_interval(0.95)
    assert found.p == pytest.approx(peer.pvalue)
    assert found.interval == statistics.Interval(pytest.approx(interval.low), pytest.approx(interval.high), 0.95)
    assert found.effect == pytest.approx(peer.statistic / math.sqrt(6)), "d_z = t / sqrt n"
    reverse = statistics.paired(B, A)
    assert (reverse.mean, reverse.p) == (pytest.approx(-found.mean), pytest.approx(found.p))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_sign_flips_are_gone_through_one_by_one(n):
    differences = [a - b for a, b in zip(A + B, B + A[::-1])][:n]
    seen = abs(math.fsum(differences))
    patterns = list(itertools.product((1, -1), repeat=n))
    extreme = sum(abs(math.fsum(s * d for s, d in zip(p, differences))) >= seen - 1e-15 for p in patterns)
    assert statistics.sign_flip(differences) == extreme / len(patterns)
    assert statistics.sign_flip(differences) >= 2.0 ** (1 - n)


def test_sign_flips_with_ties_and_zeros():
    assert statistics.sign_flip([0.1, 0.1, 0.1, 0.1]) == 2 / 16
    assert statistics.sign_flip([0.3, 0.1, 0.2]) == 2 / 8, "0.3 - 0.1 - 0.2 is 0 and not the sum"
    assert statistics.sign_flip([0.1, 0.2, -0.3]) == 1, "a sum of 0, up to rounding"
    assert statistics.sign_flip([0.0, 0.0]) == 1
    assert statistics.sign_flip([0.01] * 20) == 2.0**-19
    with pytest.raises(ValueError, match=r"25 pairs have 2\^25 sign patterns: exact up to 24"):
        statistics.sign_flip([0.1] * 25)
    assert statistics.paired(list(range(25)), [0.5] * 25).p_sign_flip is None


def test_one_pair_has_no_interval():
    found = statistics.paired([0.9], [0.8])
    assert (found.n, found.mean) == (1, pytest.approx(0.1))
    assert (found.deviation, found.interval, found.p, found.effect) == (None, None, None, None)
    assert found.p_sign_flip == 1
    assert statistics.mean([0.9]) == statistics.Estimate(1, 0.9, None, None)
    assert statistics.equivalence([0.9], [0.9]) == statistics.Equivalence(1, 0.005, None, None, False)


def test_the_same_difference_every_time_has_no_spread_to_judge_it_by():
    found = statistics.paired([0.3, 0.2, 1.1], [0.2, 0.1, 1.0])
    assert (found.deviation, found.interval, found.p, found.effect) == (0.0, None, None, None)
    assert found.p_sign_flip == 2 / 8
    assert statistics.mean([0.95, 0.95, 0.95]).interval is None


def closed(p_values):
    """Holm by its definition: the largest Bonferroni p of all the sets of hypotheses that hold the one asked for."""
    n = range(len(p_values))
    sets = [s for size in n for s in itertools.combinations(n, size + 1)]
    return [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in n]


@pytest.mark.parametrize("p_values", [[], [0.03], [0.01, 0.04, 0.03, 0.005], [0.02, 0.02, 0.9], [0.6, 0.7, 0.5]])
def test_holm_is_the_closed_test(p_values):
    assert statistics.holm(p_values) == pytest.approx(closed(p_values))


def test_holm_wants_probabilities():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="give numbers from 0 to 1"):
            statistics.holm([0.5, wrong])


def test_equivalence_is_two_one_sided_t_tests():
    d = [a - b for a, b in zip(A, B)]
    for margin in (0.001, 0.02):
        found = statistics.equivalence(A, B, margin)
        above = theirs.ttest_1samp(d, -margin, alternative="greater").pvalue
        below = theirs.ttest_1samp(d, margin, alternative="less").pvalue
        assert found.p == pytest.approx(max(above, below))
        assert found.interval is not None
        inside = -margin < found.interval.low and found.interval.high < margin
        assert found.equivalent == inside == (margin == 0.02), "the 90% interval lies within the margin"
        assert found.interval.confidence == pytest.approx(0.9)
    assert statistics.equivalence(B, A, 0.02).p == pytest.approx(statistics.equivalence(A, B, 0.02).p)


@pytest.mark.parametrize(("n", "shift"), [(3, 0.0), (5, 1.0), (10, 0.0)])
def test_t_intervals_cover_as_often_as_they_say(n, shift):
    """4,000 draws: the standard error of a share near .95 is .0034."""
    random = np.random.default_rng(n)
    draws = random.normal(shift, 1.0, (4000, n))
    found = [statistics.mean(row).interval for row in draws]
    covered = np.mean([i.low <= shift <= i.high for i in found if i is not None])
    assert covered == pytest.approx(0.95, abs=4 * 0.0034)


def exact_mcnemar(gained, lost):
    n = gained + lost
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    return sum(c for c in chance if c <= chance[gained] * (1 + 1e-9))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 1), (1, 5), (3, 3), (0, 4), (30, 12)])
def test_mcnemar_is_the_binomial_by_hand(gained, lost):
    found = statistics.mcnemar(gained, lost, 100)
    assert found.p == pytest.approx(exact_mcnemar(gained, lost))
    assert found.difference == (gained - lost) / 100
    assert found.interval is not None
    assert found.interval.low <= found.difference <= found.interval.high
    mirrored = statistics.mcnemar(lost, gained, 100).interval
    assert mirrored is not None
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.interval.high), pytest.approx(-found.interval.low))


def test_the_adjusted_interval_by_its_formula():
    """Bonett and Price 2012, eq. 3, by hand: gained 5, lost 1, n = 98."""
    p1, p2 = 0.06, 0.02
    half = 1.959964 * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / 100)
    found = statistics.mcnemar(5, 1, 98).interval
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.04 - half, abs=1e-6), pytest.approx(0.04 + half, abs=1e-6))
    even = statistics.mcnemar(0, 0, 98).interval
    assert even is not None
    assert even.low < 0 < even.high, "no sample that differs is not certainty"


@pytest.mark.parametrize("cells", [(0.05, 0.05), (0.08, 0.03), (0.02, 0.01)])
def test_the_adjusted_interval_covers(cells):
    """1,500 test sets of 200 samples; the error of a share near .95 is .006. It may cover more, never much less."""
    random = np.random.default_rng(7)
    gained, lost, _ = random.multinomial(200, [*cells, 1 - sum(cells)], 1500).T
    found = [statistics.mcnemar(int(a), int(b), 200).interval for a, b in zip(gained, lost)]
    true = cells[0] - cells[1]
    covered = np.mean([i.low <= true <= i.high for i in found if i is not None])
    assert 0.935 < covered < 0.99


def test_groups_of_one_are_nearly_a_paired_t_test():
    random = np.random.default_rng(3)
    gained = (random.random(300) < 0.1).astype(int)
    lost = ((random.random(300) < 0.05) & (gained == 0)).astype(int)
    found = statistics.clustered(gained.tolist(), lost.tolist(), [1] * 300)
    peer = theirs.ttest_1samp(gained - lost, 0.0)
    assert (found.n, found.difference) == (300, pytest.approx(np.mean(gained - lost)))
    assert found.p == pytest.approx(peer.pvalue)
    assert found.interval is not None
    assert found.interval.low == pytest.approx(peer.confidence_interval(0.95).low)


def test_positions_that_go_together_count_as_one():
    """Each of 40 texts repeated 50 times over is worth 40 samples and not 2,000."""
    gained, lost = [1] * 8 + [0] * 32, [0] * 8 + [1] * 4 + [0] * 28
    single = statistics.clustered(gained, lost, [1] * 40)
    repeated = statistics.clustered([50 * g for g in gained], [50 * g for g in lost], [50] * 40)
    assert repeated.interval == single.interval
    assert repeated.p == single.p
    assert (repeated.n, repeated.difference) == (2000, single.difference)
    naive = statistics.mcnemar(400, 200, 2000)
    assert naive.p is not None
    assert repeated.p is not None
    assert naive.p < 1e-10 < 0.1 < repeated.p


def test_groups_cover_as_often_as_they_say():
    """Groups of unequal size whose positions share their fate; 2,000 test sets of 60 groups."""
    random, covered = np.random.default_rng(5), 0
    for _ in range(2000):
        sizes = random.integers(1, 30, 60)
        fate = random.random(60)
        up, down = sizes * (fate < 0.15), sizes * (fate > 0.92)
        found = statistics.clustered(up.tolist(), down.tolist(), sizes.tolist()).interval
        covered += found is not None and found.low <= 0.15 - 0.08 <= found.high
    assert covered / 2000 == pytest.approx(0.945, abs=0.02)


def test_groups_without_anything_to_tell():
    found = statistics.clustered([2], [1], [9])
    assert (found.difference, found.interval, found.p) == (pytest.approx(1 / 9), None, None), "one group, no interval"
    assert statistics.clustered([0, 0, 0], [0, 0, 0], [3, 4, 5]).interval is None, "no spread"
    empty = statistics.clustered([1, 0, 0], [0, 1, 0], [3, 4, 0])
    assert empty == statistics.clustered([1, 0], [0, 1], [3, 4]), "a group without positions is none"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.mean([]), r"values have shape \[0\]: give one number per seed"),
        (lambda: statistics.mean([0.9, math.nan]), "values hold nan: a run that failed"),
        (lambda: statistics.mean([0.9, 0.8], 95), "confidence is 95: give a number between 0 and 1"),
        (lambda: statistics.paired([0.9, 0.8], [0.9]), "2 and 1 values are no pairs"),
        (lambda: statistics.paired([0.9, 0.8], [0.9, 0.7], 0), "confidence is 0"),
        (lambda: statistics.equivalence([1.0, 2.0], [1.0, 1.0], 0), "margin is 0: give a positive number"),
        (lambda: statistics.equivalence([1.0, 2.0], [1.0, 1.0], 1, alpha=0.5), "alpha is 0.5"),
        (lambda: statistics.mcnemar(-1, 0, 5), "gained -1, lost 0 of n = 5"),
        (lambda: statistics.mcnemar(3, 3, 5), "gained 3, lost 3 of n = 5: give counts whose sum is at most n"),
        (lambda: statistics.mcnemar(0, 0, 0), "n at least 1"),
        (lambda: statistics.mcnemar(0, 0, 5, 1.0), "confidence is 1.0"),
        (lambda: statistics.clustered([1], [0, 1], [2, 2]), "1, 2 and 2 groups"),
        (lambda: statistics.clustered([1, 3], [0, 0], [2, 2]), "gained 3, lost 0 of n = 2"),
        (lambda: statistics.clustered([], [], []), "n at least 1"),
    ],
)
def test_what_cannot_be_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        statistics.mean([1.0, 2.0]).mean = 3.0  # type: ignore[misc]


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=8), st.floats(-0.5, 0.5))
def test_p_is_that_of_a_one_sided_paired_t_test(differences: list[float], bound: float) -> None:
    zeros = [0.0] * len(differences)
    found = statistics.one_sided(statistics.paired(differences, zeros), bound)
    if np.std(differences) > 1e-6:
        shifted_zeros = [bound] * len(differences)
        expected = theirs.ttest_rel(differences, shifted_zeros, alternative="greater").pvalue
        assert found == pytest.approx(expected, abs=1e-9)


# Families


def test_sequences_end_at_the_first_failure_and_leave_their_share() -> None:
    chains = statistics.fixed_sequences
    assert chains([[0.01, 0.06, 0.001]]) == [[0.05, 0.05, None]]
    assert chains([[0.02, 0.06], [0.03, 0.04]]) == [[0.025, 0.025], [0.025, None]]
    assert chains([[0.02, 0.02], [0.03, 0.04]]) == [[0.025, 0.025], [0.05, 0.05]]
    assert chains([[None, 0.01], []]) == [[0.05, None], []]
    assert chains([]) == []
    with pytest.raises(ValueError, match=r"p value 1.2"):
        chains([[0.1, 1.2]])
    with pytest.raises(ValueError, match=r"alpha is 0"):
        chains([[0.1]], 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_sequences_of_one_hypothesis_are_holms(p_values: list[float]) -> None:
    alpha = 0.05
    levels = statistics.fixed_sequences([[p] for p in p_values], alpha)
    for p, (at,), adjusted in zip(p_values, levels, statistics.holm(p_values)):
        if abs(adjusted - alpha) > 1e-9:
            assert at is not None
            assert (p <= at) == (adjusted <= alpha)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3))
def test_of_exclusive_hypotheses_those_sets_count_that_can_be_true(pairs: list[tuple[float, float]]) -> None:
    """Never below the closed test over sets with one of each pair at most, and never above Holm over all."""
    found = statistics.holm_exclusive(pairs)
    for index, side in itertools.product(range(len(pairs)), (0, 1)):
        sets = itertools.product(*(((side,) if i == index else (None, 0, 1)) for i in range(len(pairs))))
        p_values = [[pair[s] for pair, s in zip(pairs, sides) if s is not None] for sides in sets]
        closed_p = max(min(1.0, len(each) * min(each)) for each in p_values)
        flat = statistics.holm([p for pair in pairs for p in pair])
        assert closed_p - 1e-12 <= found[index][side] <= flat[2 * index + side] + 1e-12


def test_what_is_not_tested_is_not_counted() -> None:
    assert statistics.holm_exclusive([(0.01, None), (None, None), (0.04, 0.5)]) == [
        (0.02, None), (None, None), (0.04, 0.5)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="p value 2"):
        statistics.holm_exclusive([(2, 0.1)])
