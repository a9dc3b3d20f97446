"""A level's verdict: one-sided tests as scipy has them, their error rates, and what each answer takes."""

import numpy as np
import pytest

from prune.tickets.judge import ALPHA, judged

TICKET = [0.971, 0.969, 0.973, 0.970]
DENSE = [0.970, 0.971, 0.972, 0.971]
WORSE = [0.941, 0.938, 0.946, 0.940]


def test_a_ticket_matches_dense_and_beats_every_control() -> None:
    result = judged(TICKET, {"level 0": DENSE}, {"reinit": WORSE, "shuffled": WORSE}, delta=0.005)
    assert result.verdict == "ticket"
    assert result.why == "it matches level 0 and beats reinit and shuffled"
    assert result.means["reinit"].mean == pytest.approx(np.mean(WORSE))
    assert result.beats["reinit"].paired.mean == pytest.approx(np.mean(TICKET) - np.mean(WORSE))


@pytest.mark.parametrize(
    ("dense", "controls", "verdict", "why"),
    [
        ({"level 0": [0.99] * 2 + [0.991, 0.989]}, {"reinit": WORSE}, "no ticket", "more than delta below level 0"),
        ({"level 0": DENSE, "dense": [0.99, 0.991, 0.989, 0.99]}, {"reinit": WORSE}, "no ticket", "below dense"),
        ({"level 0": DENSE}, {"reinit": WORSE, "random": DENSE}, "no ticket", "no better than random"),
        ({"level 0": DENSE}, {"reinit": [0.90, 0.99, 0.95, 0.97]}, "inconclusive", "whether it beats reinit is open"),
        ({"level 0": [0.96, 0.99, 0.95, 0.98]}, {"reinit": WORSE}, "inconclusive", "whether it matches level 0"),
        ({"level 0": DENSE}, {}, "inconclusive", "no control was trained"),
    ],
)
def test_what_is_missing_is_said(
    dense: dict[str, list[float]], controls: dict[str, list[float]], verdict: str, why: str
) -> None:
    result = judged(TICKET, dense, controls, delta=0.005)
    assert (result.verdict, why in result.why) == (verdict, True), result.why


def test_one_seed_answers_nothing() -> None:
    result = judged([0.97], {"level 0": [0.97]}, {"reinit": [0.5]}, delta=0.005)
    assert result.verdict == "inconclusive"
    assert "one seed" in result.why
    assert result.beats["reinit"].p is None


def test_p_values_are_adjusted_over_the_controls() -> None:
    near = [t - d for t, d in zip(TICKET, [0.001, 0.004, 0.002, 0.003])]
    alone = judged(TICKET, {}, {"a": near}, delta=0.005).beats["a"]
    beside = judged(TICKET, {}, {"a": near, "b": near, "c": near}, delta=0.005).beats["a"]
    assert alone.p is not None
    assert beside.p == pytest.approx(min(1, 3 * alone.p))


def test_a_ticket_that_is_none_is_seldom_called_one() -> None:
    """Nominal error rate: of controls that are as good as the ticket at most 5 % are beaten."""
    draw = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        ticket, dense, reinit, random = draw.normal(0.97, 0.002, (4, 5)).tolist()
        called += judged(ticket, {"level 0": dense}, {"reinit": reinit, "random": random}, 0.01).verdict == "ticket"
    assert called / 400 <= ALPHA


def test_delta_has_to_be_given() -> None:
    with pytest.raises(ValueError, match=r"delta is 0: give what a ticket may lose"):
        judged(TICKET, {"level 0": DENSE}, {}, delta=0)


def test_what_diverged_is_left_out_and_said() -> None:
    nan = float("nan")
    lost = [nan, *WORSE[1:]]
    result = judged(TICKET, {"level 0": DENSE}, {"reinit": lost, "random": [nan] * 4, "shuffled": WORSE}, delta=0.005)
    assert result.verdict == "ticket"
    assert result.why.endswith(
        "beats reinit and shuffled; 1 of 4 reinit diverged, left out; 4 of 4 random diverged, left out"
    )
    assert (result.beats["reinit"].paired.n, result.means["reinit"].n) == (3, 3)
    assert "random" not in result.means | result.beats
    none = judged([*TICKET[1:], nan], {"level 0": DENSE}, {"reinit": WORSE}, delta=0.005)
    assert (none.verdict, none.why) == ("no ticket", "1 of 4 diverged")


def test_a_no_is_adjusted_over_the_controls_too() -> None:
    """One in twenty is no surprise among many."""
    near = [t - 0.005 - d for t, d in zip(TICKET, [-0.004, -0.001, -0.008, -0.0065])]
    alone = judged(TICKET, {}, {"a": near}, delta=0.005).beats["a"]
    beside = judged(TICKET, {}, {"a": near, **dict.fromkeys("bcdefgh", WORSE)}, delta=0.005).beats["a"]
    assert (alone.holds, beside.holds) == (False, None)
