"""What job ``verdict`` records."""

from dataclasses import dataclass, field
from typing import Literal

from workbench.records.estimates import Equivalence, Estimate, Paired

Word = Literal["dense", "ticket", "no ticket", "inconclusive"]
Contrast = Literal["above", "below", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Against:
    """What a level's tickets have over one arm, over seeds.

    Attributes:
        paired: Ticket less arm, within seeds; positive where the ticket is better.
        p: One-sided: of being less than delta below a dense arm, or of being above a control. None if n does not allow.
        holds: Whether it matches or beats the arm: yes (True); no (False), if it is surely more than delta below the
            dense arm, or below the control; or open (None).
    """

    paired: Paired | None
    p: float | None
    holds: bool | None


@dataclass(frozen=True)
class Overlap:
    """How far masks of different seeds keep the same weights.

    Attributes:
        jaccard: Weights that both keep, of those that either keeps, in [0, 1]; mean over pairs.
        chance: What random masks of these densities have.
        pairs: Of hunts.
    """

    jaccard: float | None
    chance: float | None
    pairs: int | None


@dataclass(frozen=True)
class LevelVerdict:
    """A level judged over seeds.

    Attributes:
        level: From 0, the dense one.
        density: Kept / prunable weights, in [0, 1].
        verdict: ``"ticket"`` if it matches every dense arm and beats every control; ``"no ticket"`` if it is surely
            more than delta below a dense arm, or below a control; ``"inconclusive"`` otherwise; ``"dense"`` of level 0.
        why: What decided, in words.
        means: Arm -> score over seeds.
        matches: Dense arm -> whether the ticket is at most delta below it.
        beats: Control -> whether the ticket is above it.
        best_step: Arm -> the step of its lowest validation loss, over seeds.
        overlap: Of the masks of different seeds; None of a single hunt.
        p: Of being a ticket: the largest p of its comparisons. None if one is missing.
        alpha: The level at which that was tested; None if the sequence ended before.
        decided_by: The arms whose comparison keeps it from being a ticket.
        model_density: Kept / all parameters, in [0, 1].
    """

    level: int | None
    density: float | None
    verdict: Word
    why: str
    means: dict[str, Estimate]
    matches: dict[str, Against]
    beats: dict[str, Against]
    best_step: dict[str, Estimate] = field(default_factory=dict)
    overlap: Overlap | None = None
    p: float | None = None
    alpha: float | None = None
    decided_by: list[str] = field(default_factory=list)
    model_density: float | None = None


@dataclass(frozen=True)
class Family:
    """What is tested together: the chance of any false ticket in it is at most ``alpha``.

    Attributes:
        correction: ``holm``; or ``sequence``, from dense to sparse until the first that is not shown to be a ticket.
        alpha: Of the whole family.
        groups: Of hunts, which share it.
        levels: Of this group that are tested, in order.
    """

    correction: str = "holm"
    alpha: float = 0.05
    groups: int = 1
    levels: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A group of hunts that differ in their seed, judged.

    Attributes:
        name: What they have in common; empty where there is one group.
        hunts: Their folders' names.
        fingerprints: Of the hunts, in that order.
        seeds: In that order.
        metric: The metric that is compared, with its split, ``test/accuracy``.
        higher_is_better: Its better direction.
        delta: What a ticket may lose on the dense network, in the unit of the metric, above 0.
        levels: Those that all hunts have.
        family: What is tested together.
    """

    name: str
    hunts: list[str]
    fingerprints: list[str | None]
    seeds: list[int | None]
    metric: str = "metric"
    higher_is_better: bool = True
    delta: float = 0.0
    levels: list[LevelVerdict] = field(default_factory=list)
    family: Family | None = None

    @property
    def mode(self) -> str:
        """``"max"`` or ``"min"``."""
        return "max" if self.higher_is_better else "min"


@dataclass(frozen=True)
class LevelDifference:
    """One level of the tickets of a group less those of another, within seeds.

    Attributes:
        level: From 0.
        density: Kept / prunable weights, in [0, 1].
        paired: Differences within seeds; positive where the first group is better.
        equivalence: Whether they are within delta of each other, of this level alone.
        p_adjusted: Two-sided, of a difference; adjusted over all levels, groups and both questions. None if n does not
            allow.
        p_equivalent: Of being within delta, adjusted alike.
        verdict: ``above`` or ``below`` where p_adjusted is at most 5 %, else ``equivalent`` where p_equivalent is, else
            ``inconclusive``.
        model_density: Kept / all parameters, in [0, 1].
    """

    level: int | None
    density: float | None
    paired: Paired | None
    equivalence: Equivalence | None
    p_adjusted: float | None
    p_equivalent: float | None
    verdict: Contrast
    model_density: float | None = None


@dataclass(frozen=True)
class GroupDifference:
    """The tickets of the group ``of`` less those of the group ``less``, within the ``seeds`` that both have.

    Attributes:
        of: The one.
        less: The other.
        seeds: That both have.
        levels: That both have.
        comparisons: Levels of all such pairs of groups, for whose number p values are adjusted.
    """

    of: str
    less: str
    seeds: list[int | None]
    levels: list[LevelDifference]
    comparisons: int | None = None


@dataclass(frozen=True)
class VerdictResult:
    """Of job ``verdict``.

    Attributes:
        verdicts: One for each group of hunts.
        differences: Of every further group to the first.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    differences: list[GroupDifference] = field(default_factory=list)
