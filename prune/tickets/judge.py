"""Is it a ticket? Levels of several hunts judged against the dense network and against their controls.

Two questions with two margins. *Matching* is non-inferiority: a ticket is less than delta below every dense arm.
*Beating* is superiority: it is above every control, by however little. Both are answered by one-sided paired t tests.

A level is a ticket where all of its tests reject at once: an intersection-union test, whose p is the largest of theirs
and which needs no correction for their number. Levels and groups do need one (:func:`judged`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.evaluation.statistics import fixed_sequences, holm, mean, one_sided, paired
from workbench.records.estimates import Paired
from workbench.records.verdict import Against, LevelVerdict

ALPHA = 0.05
Correction = Literal["sequence", "holm"]
NO_REFERENCE = "there is no dense network to match"
NO_CONTROL = "no control was trained: give the hunt controls"


@dataclass(frozen=True)
class LevelScores:
    """Scores of one level over seeds, the higher the better; entry i of every arm is of the same seed.

    A score that is not finite is of a training that diverged.

    Args:
        ticket: Of the tickets.
        dense: Arm -> of networks that were not pruned.
        controls: Arm -> of other networks as sparse.
        level: Its number.

    Raises:
        ValueError: If there is no seed, or arms differ in their number.
    """

    ticket: Sequence[float]
    dense: Mapping[str, Sequence[float]]
    controls: Mapping[str, Sequence[float]]
    level: int = 1

    def __post_init__(self) -> None:
        counts = {arm: len(scores) for arm, scores in self.arms.items()}
        if len(set(counts.values())) > 1 or not len(self.ticket):
            raise ValueError(f"level {self.level} has scores {counts}: give every arm of the same seeds, one at least")

    @property
    def arms(self) -> dict[str, Sequence[float]]:
        """All of them by name."""
        return {"ticket": self.ticket, **self.dense, **self.controls}

    @property
    def diverged(self) -> dict[str, int]:
        """Arm -> in how many seeds it diverged, if in any."""
        counts = {arm: sum(not math.isfinite(score) for score in scores) for arm, scores in self.arms.items()}
        return {arm: count for arm, count in counts.items() if count}


def judged(
    groups: Sequence[Sequence[LevelScores]], delta: float, correction: Correction = "holm"
) -> list[list[LevelVerdict]]:
    """Judge every level of every group of hunts; at most 5 % of the time one that is no ticket is called one.

    - ``holm``: Holm over all levels of all groups. A level that fails does not end it, so levels that are as easy for
      the controls as for the ticket, as dense ones are, hide no ticket that is sparser.
    - ``sequence``: from dense to sparse, each level at the full level of the test, until one is not shown to be a
      ticket; sparser ones are not tested. Groups share 5 % equally, and one that is a ticket to its last level leaves
      its share to the others. It has more power where the ticket beats its controls from the first level on.

    A level is no ticket where it is significantly more than delta below a dense arm, or significantly below a control:
    after Holm over all comparisons of all levels and groups. What is neither is inconclusive.

    The pairs of an arm that diverged are left out, and an arm that diverged in every seed is; without any dense arm, or
    any control, nothing is called a ticket. A ticket that diverged is none.

    Args:
        groups: The levels of each, from dense to sparse, without the dense one.
        delta: What a ticket may lose on the dense network, in the unit of the scores, above 0.
        correction: For the number of levels and groups.

    Returns:
        The levels of each group.

    Raises:
        ValueError: If delta is not above 0, or the correction is none of these.

    Source: Berger 1982, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24(4), for the
    intersection-union test; see `fixed_sequences` and `holm` for the rest.
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}: give what a ticket may lose on the dense network, above 0")
    tests = [[_Tests.of(scores, delta) for scores in levels] for levels in groups]
    if correction == "sequence":
        at = fixed_sequences([[each.p for each in levels] for levels in tests], ALPHA)
    elif correction == "holm":
        flat = iter(fixed_sequences([[each.p] for levels in tests for each in levels], ALPHA))
        at = [[next(flat)[0] for _ in levels] for levels in tests]
    else:
        raise ValueError(f"correction is {correction!r}: choose sequence or holm")
    worse = {
        (group, place, arm): p
        for group, levels in enumerate(tests)
        for place, each in enumerate(levels)
        for arm, p in each.worse.items()
    }
    refuted = {key for key, p in zip(worse, holm(list(worse.values()))) if p <= ALPHA}
    result = []
    for group, levels in enumerate(tests):
        # The level at which the sequence ended is the last one that was tested.
        end = max((each.scores.level for each, alpha in zip(levels, at[group]) if alpha is not None), default=None)
        result.append(
            [
                each.verdict(alpha, {arm for g, p, arm in refuted if (g, p) == (group, place)}, end)
                for place, (each, alpha) in enumerate(zip(levels, at[group]))
            ]
        )
    return result


@dataclass(frozen=True)
class _Tests:
    """The tests of one level.

    Args:
        scores: Of what.
        matches: Dense arm -> ticket less arm, and p of being less than delta below it.
        beats: Control -> ticket less arm, and p of being above it.
        worse: Arm -> p of the opposite: more than delta below the dense arm, below the control.
    """

    scores: LevelScores
    matches: Mapping[str, tuple[Paired, float | None]]
    beats: Mapping[str, tuple[Paired, float | None]]
    worse: Mapping[str, float]

    @classmethod
    def of(cls, scores: LevelScores, delta: float) -> "_Tests":
        """Test a level; nothing where the ticket diverged."""
        ticket = scores.ticket
        dense, controls = (
            {} if "ticket" in scores.diverged else _compared(ticket, arms) for arms in (scores.dense, scores.controls)
        )
        matches = {arm: (pairs, one_sided(pairs, -delta)) for arm, pairs in dense.items()}
        beats = {arm: (pairs, one_sided(pairs)) for arm, pairs in controls.items()}
        worse = {arm: 1 - p for arm, (_, p) in (*matches.items(), *beats.items()) if p is not None}
        return cls(scores, matches, beats, worse)

    @property
    def p(self) -> float | None:
        """Of the intersection-union test; None where a test is missing."""
        if not self.matches or not self.beats:
            return None
        p_values = [p for _, p in (*self.matches.values(), *self.beats.values())]
        known = [p for p in p_values if p is not None]
        return max(known) if len(known) == len(p_values) else None

    def verdict(self, alpha: float | None, refuted: set[str], end: int | None) -> LevelVerdict:
        """What follows.

        Args:
            alpha: The level at which it was tested; None if the sequence ended before.
            refuted: Arms that it surely does not match, or is below.
            end: The level at which the sequence ended.
        """
        p, scores = self.p, self.scores
        is_ticket = p is not None and alpha is not None and p <= alpha
        both = {**self.matches, **self.beats}
        passed = self._passed(alpha)
        holds = {arm: True if is_ticket or arm in passed else False if arm in refuted else None for arm in both}
        matches, beats = (
            {arm: Against(pairs, p, holds[arm]) for arm, (pairs, p) in part.items()}
            for part in (self.matches, self.beats)
        )
        means = {arm: mean(kept) for arm, s in scores.arms.items() if (kept := [x for x in s if math.isfinite(x)])}
        lost = {arm: f"{arm} diverged in {_of(count, len(scores.ticket))}" for arm, count in scores.diverged.items()}
        notes = [f"{text}, left out" for arm, text in lost.items() if arm != "ticket"]
        decided: list[str] = []
        if "ticket" in lost:
            verdict, why, notes = "no ticket", f"the {lost['ticket']}", []
        elif refuted:
            verdict, decided = "no ticket", [arm for arm in both if arm in refuted]
            why = ", ".join(f"it is {'more than delta ' if arm in matches else ''}below {arm}" for arm in decided)
        elif is_ticket:
            verdict, why = "ticket", f"it matches {_all(matches)} and beats {_all(beats)}"
        else:
            verdict, (why, decided) = "inconclusive", self._open(alpha, end)
            if not decided and not both.keys() >= {*scores.dense, *scores.controls}:
                notes = []  # the reason names them
        why = "; ".join([why, *notes])
        return LevelVerdict(None, None, verdict, why, means, matches, beats, p=p, alpha=alpha, decided_by=decided)

    def _passed(self, alpha: float | None) -> set[str]:
        """Arms that it matches or beats also where it does not all of them: after Holm over the level's arms."""
        known = {arm: p for arm, (_, p) in (*self.matches.items(), *self.beats.items()) if p is not None}
        if alpha is None:
            return set()
        return {arm for arm, p in zip(known, holm(list(known.values()))) if p <= alpha}

    def _open(self, alpha: float | None, end: int | None) -> tuple[str, list[str]]:
        """Why it is neither, and the arms that decided it."""
        scores = self.scores
        if not self.matches:
            gone = f"{_all(scores.dense)} diverged in every seed: " if scores.dense else ""
            return f"{gone}{NO_REFERENCE}", []
        if not self.beats:
            if not scores.controls:
                return NO_CONTROL, []
            return f"{_all(scores.controls)} diverged in every seed: no control is left to beat", []
        if len(scores.ticket) < 2:
            return "one seed has no spread: train more", []
        if alpha is None:
            return f"not tested, as the sequence from dense to sparse ended at level {end}", []
        texts, decided = [], []
        for what, part in (("match", self.matches), ("beat", self.beats)):
            if failed := [arm for arm, (_, p) in part.items() if p is None or p > alpha]:
                texts.append(f"it is not shown to {what} {_all(failed)}")
                decided += failed
        return ", ".join(texts), decided


def _compared(ticket: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, Paired]:
    """Arm -> what the tickets have over it, in the pairs in which it did not diverge; without arms that all did."""
    compared = {}
    for arm, scores in others.items():
        if kept := [index for index, score in enumerate(scores) if math.isfinite(score)]:
            compared[arm] = paired([ticket[index] for index in kept], [scores[index] for index in kept])
    return compared


def _of(count: int, seeds: int) -> str:
    return "every seed" if count == seeds else f"{count} of {seeds} seeds"


def _all(arms: Mapping[str, object] | Sequence[str]) -> str:
    return " and ".join(arms)
