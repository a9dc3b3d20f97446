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
        p: One-sided, of matching or of beating it; adjusted over controls where there are several. None if n does not
            allow.
        holds: Whether it does: yes (True), no (False), or open (None).
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
        verdict: ``"ticket"`` if it matches every dense arm and beats every control; ``"no ticket"`` if it surely does
            not match or beat one of these; ``"inconclusive"`` while one is open, or no control was trained;
            ``"dense"`` of level 0.
        why: What decided, in words.
        means: Arm -> score over seeds.
        matches: Dense arm -> whether the ticket is at most delta below it.
        beats: Control -> whether the ticket is above it.
        best_step: Arm -> the step of its lowest validation loss, over seeds.
        overlap: Of the masks of different seeds; None of a single hunt.
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
    """

    name: str
    hunts: list[str]
    fingerprints: list[str | None]
    seeds: list[int | None]
    metric: str = "metric"
    higher_is_better: bool = True
    delta: float = 0.0
    levels: list[LevelVerdict] = field(default_factory=list)

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
        equivalence: Whether they are within delta of each other.
        p_holm: Two-sided, adjusted over levels; None if n does not allow.
        verdict: ``above`` or ``below`` where p_holm is at most 5 %, else ``equivalent``, else ``inconclusive``.
    """

    level: int | None
    density: float | None
    paired: Paired | None
    equivalence: Equivalence | None
    p_holm: float | None
    verdict: Contrast


@dataclass(frozen=True)
class GroupDifference:
    """The tickets of the group ``of`` less those of the group ``less``, within the ``seeds`` that both have."""

    of: str
    less: str
    seeds: list[int | None]
    levels: list[LevelDifference]


@dataclass(frozen=True)
class VerdictResult:
    """Of job ``verdict``.

    Attributes:
        verdicts: One for each group of hunts.
        differences: Of every further group to the first.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    differences: list[GroupDifference] = field(default_factory=list)
