"""A level's verdict: one-sided tests as scipy has them, their error rates, and what each answer takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prune.tickets.judge import ALPHA, Correction, LevelScores, judged
from workbench.evaluation.statistics import fixed_sequences
from workbench.records import LevelVerdict

TICKET = [0.971, 0.969, 0.973, 0.970]
DENSE = [0.970, 0.971, 0.972, 0.971]
WORSE = [0.941, 0.938, 0.946, 0.940]
NAN = [float("nan")] * 4


def one(ticket: Sequence[float], dense: Any, controls: Any, delta: float = 0.005, **options: Any) -> LevelVerdict:
    return judged([[LevelScores(ticket, dense, controls)]], delta, **options)[0][0]


def scores(**arms: Sequence[float]) -> LevelScores:
    """A level whose dense arm is DENSE and whose ticket is TICKET unless given."""
    level = int(arms.pop("level", [1])[0])
    return LevelScores(arms.pop("ticket", TICKET), {"level 0": arms.pop("dense", DENSE)}, arms, level)


def test_a_ticket_matches_dense_and_beats_every_control() -> None:
    result = one(TICKET, {"level 0": DENSE}, {"reinit": WORSE, "shuffled": WORSE})
    assert result.verdict == "ticket"
    assert result.why == "it matches level 0 and beats reinit and shuffled"
    assert result.means["reinit"].mean == pytest.approx(np.mean(WORSE))
    assert result.beats["reinit"].paired.mean == pytest.approx(np.mean(TICKET) - np.mean(WORSE))
    assert (result.alpha, result.decided_by) == (ALPHA, [])


@pytest.mark.parametrize(
    ("dense", "controls", "verdict", "why"),
    [
        ({"level 0": [0.99] * 2 + [0.991, 0.989]}, {"reinit": WORSE}, "no ticket", "more than delta below level 0"),
        ({"level 0": DENSE, "dense": [0.99, 0.991, 0.989, 0.99]}, {"reinit": WORSE}, "no ticket", "delta below dense"),
        ({"level 0": DENSE}, {"reinit": WORSE, "random": [0.98, 0.979, 0.981, 0.98]}, "no ticket", "is below random"),
        ({"level 0": DENSE}, {"reinit": WORSE, "random": DENSE}, "inconclusive", "it is not shown to beat random"),
        ({"level 0": DENSE}, {"reinit": [0.90, 0.99, 0.95, 0.97]}, "inconclusive", "it is not shown to beat reinit"),
        ({"level 0": [0.96, 0.99, 0.95, 0.98]}, {"reinit": WORSE}, "inconclusive", "not shown to match level 0"),
        ({"level 0": DENSE}, {}, "inconclusive", "no control was trained"),
        ({}, {"reinit": WORSE}, "inconclusive", "there is no dense network to match"),
    ],
)
def test_what_is_missing_is_said(
    dense: dict[str, list[float]], controls: dict[str, list[float]], verdict: str, why: str
) -> None:
    result = one(TICKET, dense, controls)
    assert (result.verdict, why in result.why) == (verdict, True), result.why


def test_one_seed_answers_nothing() -> None:
    result = one([0.97], {"level 0": [0.97]}, {"reinit": [0.5]})
    assert result.verdict == "inconclusive"
    assert "one seed" in result.why
    assert result.beats["reinit"].p is None


# Two questions, two margins


def test_better_by_less_than_delta_is_better() -> None:
    """A ticket .003 above the control at delta .02: what delta allows against the dense network is not asked of it."""
    reinit = [t - 0.003 - d for t, d in zip(TICKET, [0.0002, -0.0003, 0.0001, 0.0])]
    result = one(TICKET, {"level 0": DENSE}, {"reinit": reinit}, delta=0.02)
    assert (result.verdict, result.beats["reinit"].holds) == ("ticket", True)
    _, p = stats.ttest_rel(TICKET, reinit, alternative="greater")
    assert result.beats["reinit"].p == pytest.approx(p)
    _, p = stats.ttest_1samp(np.subtract(TICKET, DENSE), -0.02, alternative="greater")
    assert result.matches["level 0"].p == pytest.approx(p)
    assert result.p == pytest.approx(max(result.beats["reinit"].p, p))


@pytest.mark.parametrize("advantage", [0.0, 0.003])
def test_what_is_no_worse_than_a_control_is_seldom_called_worse(advantage: float) -> None:
    draw = np.random.default_rng(0)
    words = []
    for _ in range(100):
        ticket, dense, reinit = draw.normal(0.97, 0.003, (3, 5))
        words.append(one((ticket + advantage).tolist(), {"level 0": dense.tolist()}, {"reinit": reinit.tolist()}, 0.02))
    assert sum(each.verdict == "no ticket" for each in words) / len(words) <= ALPHA
    assert not any("better" in each.why for each in words)


def test_a_ticket_of_several_controls_needs_no_correction_for_their_number() -> None:
    """It has to beat all of them, which is the harder the more there are."""
    near = [t - d for t, d in zip(TICKET, [0.001, 0.004, 0.002, 0.003])]
    alone = one(TICKET, {"level 0": DENSE}, {"a": near})
    beside = one(TICKET, {"level 0": DENSE}, {"a": near, "b": near, "c": near})
    assert alone.verdict == beside.verdict == "ticket"
    assert alone.p == beside.p == alone.beats["a"].p


def test_one_answer_of_a_level_that_is_no_ticket_is_corrected_for_the_number_of_arms() -> None:
    near = [t - d for t, d in zip(TICKET, [0.001, 0.006, 0.002, 0.003])]
    alone = one(TICKET, {"level 0": DENSE}, {"near": near, "a": TICKET})
    beside = one(TICKET, {"level 0": DENSE}, {"near": near, **dict.fromkeys("abcdefgh", DENSE)})
    assert ALPHA / 2 < alone.beats["near"].p < ALPHA
    assert (alone.beats["near"].holds, beside.beats["near"].holds) == (True, None)


# What diverged


def test_what_diverged_is_left_out_and_said() -> None:
    lost = [float("nan"), *WORSE[1:]]
    result = one(TICKET, {"level 0": DENSE}, {"reinit": lost, "random": NAN, "shuffled": WORSE})
    assert result.verdict == "ticket"
    assert result.why == (
        "it matches level 0 and beats reinit and shuffled; reinit diverged in 1 of 4 seeds, left out; random diverged "
        "in every seed, left out"
    )
    assert (result.beats["reinit"].paired.n, result.means["reinit"].n) == (3, 3)
    assert "random" not in result.means | result.beats
    none = one([*TICKET[1:], NAN[0]], {"level 0": DENSE}, {"reinit": WORSE})
    assert (none.verdict, none.why) == ("no ticket", "the ticket diverged in 1 of 4 seeds")


def test_without_a_dense_network_that_trained_nothing_is_a_ticket() -> None:
    result = one(TICKET, {"level 0": NAN}, {"reinit": WORSE})
    assert (result.verdict, result.matches) == ("inconclusive", {})
    assert result.why == "level 0 diverged in every seed: there is no dense network to match"
    both = one(TICKET, {"level 0": NAN, "dense": NAN}, {"reinit": WORSE})
    assert both.why == "level 0 and dense diverged in every seed: there is no dense network to match"
    left = one(TICKET, {"level 0": DENSE, "dense": NAN}, {"reinit": WORSE})
    assert (left.verdict, left.why) == (
        "ticket", "it matches level 0 and beats reinit; dense diverged in every seed, left out"
    )  # fmt: skip


def test_controls_that_all_diverged_were_trained() -> None:
    result = one(TICKET, {"level 0": DENSE}, {"reinit": NAN, "random": NAN})
    assert result.verdict == "inconclusive"
    assert result.why == "reinit and random diverged in every seed: no control is left to beat"


# Many levels


def drawn(levels: int, seeds: int, draw: np.random.Generator, arms: Mapping[str, float]) -> list[LevelScores]:
    """Levels whose arms are this far above the dense network."""
    dense = draw.normal(0.97, 0.003, seeds).tolist()
    made = []
    for level in range(1, levels + 1):
        rows = {arm: (draw.normal(0.97, 0.003, seeds) + shift).tolist() for arm, shift in arms.items()}
        made.append(LevelScores(rows.pop("ticket"), {"level 0": dense}, rows, level))
    return made


def test_a_sequence_ends_at_its_first_failure() -> None:
    good, bad = scores(reinit=WORSE), scores(reinit=[t + d for t, d in zip(TICKET, (0.01, -0.01, 0.02, -0.01))])
    levels = [LevelScores(each.ticket, each.dense, each.controls, n) for n, each in enumerate((good, bad, good), 1)]
    (found,) = judged([levels], 0.005, "sequence")
    assert [each.verdict for each in found] == ["ticket", "inconclusive", "inconclusive"]
    assert [each.alpha for each in found] == [ALPHA, ALPHA, None]
    assert found[1].decided_by == ["reinit"]
    assert found[2].why == "not tested, as the sequence from dense to sparse ended at level 2"
    assert found[2].beats["reinit"].holds is None
    (every,) = judged([levels], 0.005)
    assert [each.verdict for each in every] == ["ticket", "inconclusive", "ticket"]
    with pytest.raises(ValueError, match="correction is 'none': choose sequence or holm"):
        judged([levels], 0.005, "none")  # type: ignore[arg-type]


def test_dense_levels_at_which_controls_are_as_good_hide_no_ticket() -> None:
    """As in most hunts. A sequence ends at the first of them: it finds a ticket in 1 of 100 such hunts, Holm in 99."""
    draw, shown = np.random.default_rng(3), {"holm": 0, "sequence": 0}
    for _ in range(10):
        levels = drawn(3, 5, draw, {"ticket": 0.0, "reinit": 0.0})
        levels += drawn(4, 5, draw, {"ticket": 0.0, "reinit": -0.03})
        for correction in shown:
            (found,) = judged([levels], 0.02, correction)
            shown[correction] += any(each.verdict == "ticket" for each in found[3:])
    assert shown == {"holm": 10, "sequence": 0}


@pytest.mark.parametrize("correction", ["holm", "sequence"])
def test_twelve_levels_without_a_ticket_seldom_show_one(correction: Correction) -> None:
    """46 % of hunts would, each level at 5 %: 12 of 25. More than 4 are seen by chance less than once in a hundred."""
    draw = np.random.default_rng(1)
    shown = 0
    for _ in range(25):
        (found,) = judged([drawn(12, 5, draw, {"ticket": 0.0, "reinit": 0.0})], 0.02, correction)
        shown += any(each.verdict == "ticket" for each in found)
    assert shown <= 4


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_family_wise_error_rate_is_nominal(groups: int, chained: bool) -> None:
    """The procedure on p values of the same t tests, often enough to see 5 %; 12 levels, 5 seeds, no ticket."""
    draw, hunts = np.random.default_rng(2), 4000
    difference = draw.normal(size=(hunts, groups, 12, 5)) - draw.normal(size=(hunts, groups, 12, 5))
    p = stats.ttest_1samp(difference, 0.0, axis=-1, alternative="greater").pvalue
    chains = p if chained else p.reshape(hunts, groups * 12, 1)
    false = sum(
        any(p <= at for chain, levels in zip(hunt, fixed_sequences(hunt)) for p, at in zip(chain, levels) if at)
        for hunt in chains.tolist()
    )
    assert 0.04 <= false / hunts <= 0.055, "without it .46 and .84"
    assert (p <= ALPHA).any((1, 2)).mean() > 0.4


def test_groups_share_what_is_tested() -> None:
    near = [t - d for t, d in zip(TICKET, [0.001, 0.006, 0.002, 0.003])]
    alone = judged([[scores(reinit=near)]], 0.005)[0][0]
    assert (alone.verdict, ALPHA / 2 < alone.p < ALPHA) == ("ticket", True)
    first, second = judged([[scores(reinit=near)], [scores(reinit=DENSE)]], 0.005)
    assert (first[0].verdict, first[0].alpha, first[0].decided_by) == ("inconclusive", ALPHA / 2, ["reinit"])
    assert second[0].alpha == ALPHA / 2
    first, second = judged([[scores(reinit=near)], [scores(reinit=WORSE)]], 0.005)
    assert (first[0].verdict, first[0].alpha) == ("ticket", ALPHA), "the second leaves it its share"


def test_a_no_is_corrected_for_all_comparisons() -> None:
    """One in twenty is no surprise among many."""
    above = [t + d for t, d in zip(TICKET, [0.001, 0.004, 0.002, 0.003])]
    alone = one(TICKET, {"level 0": DENSE}, {"a": above})
    assert (alone.verdict, alone.beats["a"].holds, alone.decided_by) == ("no ticket", False, ["a"])
    (beside,) = judged([[scores(a=above), *[scores(a=WORSE)] * 8]], 0.005)
    assert (beside[0].verdict, beside[0].beats["a"].holds) == ("inconclusive", None)


def test_delta_and_scores_are_checked() -> None:
    with pytest.raises(ValueError, match=r"delta is 0: give what a ticket may lose"):
        one(TICKET, {"level 0": DENSE}, {}, delta=0)
    with pytest.raises(ValueError, match=r"level 1 has scores \{'ticket': 4, 'level 0': 3\}: give every arm of the"):
        LevelScores(TICKET, {"level 0": DENSE[1:]}, {})
