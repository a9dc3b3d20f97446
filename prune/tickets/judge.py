"""Is it a ticket? One level of several hunts judged against the dense network and against its controls."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from workbench.evaluation.statistics import holm, mean, one_sided, paired
from workbench.records.estimates import Paired
from workbench.records.verdict import Against, LevelVerdict, Word

ALPHA = 0.05


def judged(
    ticket: Sequence[float],
    dense: Mapping[str, Sequence[float]],
    controls: Mapping[str, Sequence[float]],
    delta: float,
) -> LevelVerdict:
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
        why = f"{diverged} of {len(ticket)} diverged"
        return LevelVerdict(None, None, "no ticket", why, means, {}, {})
    matches = {}
    for arm, pairs in _compared(ticket, dense).items():
        p = one_sided(pairs, -delta)
        holds = None if p is None else True if p <= ALPHA else False if p >= 1 - ALPHA else None
        matches[arm] = Against(pairs, p, holds)
    beats = {}
    compared = _compared(ticket, controls)
    above, below = _adjusted(compared, 0.0, 1), _adjusted(compared, delta, -1)
    for arm, pairs in compared.items():
        p, no = above.get(arm), below.get(arm)
        holds = True if p is not None and p <= ALPHA else False if no is not None and no <= ALPHA else None
        beats[arm] = Against(pairs, p, holds)
    verdict, why = _verdict(len(ticket), matches, beats)
    lost = {arm: sum(not math.isfinite(score) for score in scores) for arm, scores in arms.items()}
    notes = [f"{count} of {len(ticket)} {arm} diverged, left out" for arm, count in lost.items() if count]
    return LevelVerdict(None, None, verdict, "; ".join([why, *notes]), means, matches, beats)


def _compared(ticket: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Paired]:
    """Arm -> what the tickets have over it, in the pairs in which it did not diverge; without arms that all did."""
    compared = {}
    for arm, scores in others.items():
        if kept := [index for index, score in enumerate(scores) if math.isfinite(score)]:
            compared[arm] = paired([ticket[index] for index in kept], [scores[index] for index in kept])
    return compared


def _adjusted(compared: Mapping[str, Paired], bound: float, side: Literal[1, -1]) -> dict[str, float]:
    """Arm -> p, after Holm, of a mean difference above ``bound`` (side 1) or below it (-1); without open ones."""
    raw = {arm: p for arm, pairs in compared.items() if (p := one_sided(pairs, bound)) is not None}
    return dict(zip(raw, holm([p if side > 0 else 1 - p for p in raw.values()])))


def _verdict(n: int, matches: Mapping[str, Against], beats: Mapping[str, Against]) -> tuple[Word, str]:
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
