"""Is it a ticket? One level of several hunts judged against the dense network and against its controls."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from workbench.evaluation.statistics import Mean, Paired, holm, mean, paired

ALPHA = 0.05
Said = Literal["ticket", "no ticket", "inconclusive"]


@dataclass(frozen=True)
class Against:
    """What a level's tickets have over one arm, over seeds.

    Attributes:
        paired: Ticket less arm, within seeds; positive where the ticket is better.
        p: Of the question asked, one-sided; adjusted over controls where there are several. None if n does not allow.
        holds: Whether the answer is yes (True), no (False), or open (None).
    """

    paired: Paired
    p: float | None
    holds: bool | None


@dataclass(frozen=True)
class Judgement:
    """A level judged.

    Attributes:
        verdict: ``"ticket"`` if it matches every dense arm and beats every control; ``"no ticket"`` if one of these is
            answered no; ``"inconclusive"`` while one is open, or no control was trained.
        why: What decided, in words.
        means: Arm -> score over seeds.
        matches: Dense arm -> the ticket is no more than delta below it.
        beats: Control -> the ticket is above it.
    """

    verdict: Said
    why: str
    means: dict[str, Mean]
    matches: dict[str, Against]
    beats: dict[str, Against]


def judged(
    ticket: Sequence[float],
    dense: Mapping[str, Sequence[float]],
    controls: Mapping[str, Sequence[float]],
    delta: float,
) -> Judgement:
    """Judge a level by scores over seeds, the higher the better; entry i of every arm is of the same seed.

    Matching is non-inferiority: yes where the one-sided 95 % bound of ticket - dense is above -delta, no where it is
    below -delta from the other side. Beating is superiority: yes where a one-sided paired t test, after Holm over the
    controls, has p <= .05; no where the ticket is, by the same test, surely no better by more than delta. Seeds that
    all differ by the same amount, or a single one, answer nothing.

    A score that is not finite is of a training that diverged. The pairs of an arm that did are left out, which is to
    the ticket's disadvantage; a ticket that did is none.

    Args:
        ticket: Scores of the tickets.
        dense: Arm -> scores of networks that were not pruned.
        controls: Arm -> scores of other networks as sparse.
        delta: In the unit of the scores, above 0.

    Raises:
        ValueError: If delta is not above 0, there is no seed, or arms differ in their number.
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}: give what a ticket may lose on the dense network, above 0")
    arms = {"ticket": ticket, **dense, **controls}
    means = {arm: mean(finite) for arm, scores in arms.items() if (finite := [s for s in scores if math.isfinite(s)])}
    if diverged := sum(not math.isfinite(score) for score in ticket):
        return Judgement("no ticket", f"{diverged} of {len(ticket)} diverged", means, {}, {})
    matches = {}
    for arm, found in _compared(ticket, dense).items():
        p = shifted(found, -delta)
        matches[arm] = Against(
            found, p, None if p is None else True if p <= ALPHA else False if p >= 1 - ALPHA else None
        )
    beats = {}
    compared = _compared(ticket, controls)
    above, below = _adjusted(compared, 0.0, 1), _adjusted(compared, delta, -1)
    for arm, found in compared.items():
        p, no = above.get(arm), below.get(arm)
        holds = True if p is not None and p <= ALPHA else False if no is not None and no <= ALPHA else None
        beats[arm] = Against(found, p, holds)
    verdict, why = _said(len(ticket), matches, beats)
    gone = {arm: sum(not math.isfinite(score) for score in scores) for arm, scores in arms.items()}
    told = [f"{count} of {len(ticket)} {arm} diverged, left out" for arm, count in gone.items() if count]
    return Judgement(verdict, "; ".join([why, *told]), means, matches, beats)


def _compared(ticket: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Paired]:
    """Arm -> what the tickets have over it, in the pairs in which it did not diverge; without arms that all did."""
    found = {}
    for arm, scores in others.items():
        whole = [index for index, score in enumerate(scores) if math.isfinite(score)]
        if len(whole) == len(scores):
            found[arm] = paired(ticket, scores)
        elif whole:
            found[arm] = paired([ticket[index] for index in whole], [scores[index] for index in whole])
    return found


def _adjusted(compared: Mapping[str, Paired], bound: float, side: Literal[1, -1]) -> dict[str, float]:
    """Arm -> p, after Holm, of a mean difference above ``bound`` (side 1) or below it (-1); without open ones."""
    raw = {arm: p for arm, found in compared.items() if (p := shifted(found, bound)) is not None}
    return dict(zip(raw, holm([p if side > 0 else 1 - p for p in raw.values()])))


def shifted(found: Paired, bound: float) -> float | None:
    """One-sided p of the paired t test whose null is a mean difference of at most ``bound``; None without spread."""
    if not found.deviation or found.n < 2:
        return None
    return float(stats.t.sf((found.mean - bound) / (found.deviation / found.n**0.5), found.n - 1))


def _said(n: int, matches: Mapping[str, Against], beats: Mapping[str, Against]) -> tuple[Said, str]:
    worse = [f"it is more than delta below {arm}" for arm, each in matches.items() if each.holds is False]
    worse += [f"it is no better than {arm}" for arm, each in beats.items() if each.holds is False]
    if worse:
        return "no ticket", ", ".join(worse)
    if n < 2:
        return "inconclusive", "one seed has no spread: train more"
    if not beats:
        return "inconclusive", "no control was trained: give the hunt controls"
    open_ = [f"whether it matches {arm}" for arm, each in matches.items() if each.holds is None]
    open_ += [f"whether it beats {arm}" for arm, each in beats.items() if each.holds is None]
    if open_:
        return "inconclusive", f"{', '.join(open_)} is open at n = {n}"
    return "ticket", f"it matches {' and '.join(matches)} and beats {' and '.join(beats)}"
