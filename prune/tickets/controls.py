"""What a hunt trains and measures beside the ticket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prune.connectivity.interpolation import SPLITS, Split
from workbench.records.source import Source

ControlName = Literal["reinit", "shuffled", "random", "dense", "twin"]
CONTROLS = ("reinit", "shuffled", "random", "dense", "twin")


@dataclass(frozen=True)
class Interpolation:
    """Where error barriers are evaluated on the straight line between two trainings.

    ``connectivity: true`` is ``connectivity: {points: 11, split: val}``.

    Args:
        points: How many points on the line, both ends included, 3 or more; Frankle et al. (2020) use 30.
        split: The data that every point is evaluated on: train, val or test, or a list of these. Frankle et al. (2020)
            use train and test.

    Raises:
        ValueError: If a value is none of these.
    """

    points: int = 11
    split: Split | tuple[Split, ...] = ("val",)

    def __post_init__(self) -> None:
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 3:
            raise ValueError(f"connectivity.points is {self.points!r}: give 3 or more, the two ends included")
        given = (self.split,) if isinstance(self.split, str) else tuple(self.split)
        if not given or len(set(given)) < len(given) or set(given) - set(SPLITS):
            raise ValueError(f"connectivity.split is {self.split!r}: give one of {list(SPLITS)}, or several, each once")
        object.__setattr__(self, "split", given)

    @property
    def splits(self) -> tuple[Split, ...]:
        """``split``, one or several, as a tuple."""
        return (self.split,) if isinstance(self.split, str) else self.split

    def measured(self, barriers: Mapping[str, Any]) -> bool:
        """Whether these barriers, split -> what :func:`prune.connectivity.error_barrier` gave, are of this line."""
        return set(barriers) == set(self.splits) and all(len(b["alphas"]) == self.points for b in barriers.values())


@dataclass(frozen=True)
class Controls:
    """What a hunt trains and measures beside the ticket, at every level from 1 on.

    A bare list, ``controls: [reinit, random]``, is ``{arms: [reinit, random]}``.

    Args:
        arms: Trainings beside the ticket. `reinit`: the ticket's mask on new initial weights. `shuffled`: the mask
            shuffled within each layer. `random`: a random mask. `twin`: the ticket with another order of the data.
            `dense`: never pruned, trained for as many updates as all levels so far, or until early_stop ends it.
        other: Another hunt in the same network, such as one with another seed; its mask is one more control.
        connectivity: Train a twin of every ticket with another data order, and measure the error barrier between the
            two, and between each level and the previous one (Frankle et al. 2020); or a mapping that also sets the
            points on the line and the split of the data. Only for `hunt`.
        diagnose: Record dead units and gradient flow of every training, and after each epoch the distance between the
            mask that would be selected now and that of the previous epoch (the early-bird distance of You et al. 2020,
            relative to chance).
            Only for `hunt`.

    Raises:
        ValueError: If an arm is none of these.
    """

    arms: tuple[ControlName, ...] = ()
    other: Source | None = None
    connectivity: bool | Interpolation = False
    diagnose: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(self.arms))
        if unknown := [name for name in self.arms if name not in CONTROLS]:
            hint = ": give the hunt whose mask it has as controls.other" if unknown[0] == "other" else ""
            raise ValueError(f"controls has {unknown[0]!r}{hint}: choose from {list(CONTROLS)}")

    @property
    def interpolation(self) -> Interpolation | None:
        """Where error barriers are evaluated; None if there are none."""
        if isinstance(self.connectivity, Interpolation):
            return self.connectivity
        return Interpolation() if self.connectivity else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all controls, in the order in which they are trained."""
        return (*self.arms, *(("other",) if self.other else ()))

    @classmethod
    def parse(cls, given: "Sequence[ControlName] | Controls | None") -> "Controls":
        """A bare list of arms, or all of it.

        Raises:
            ValueError: If an arm is unknown.
        """
        return given if isinstance(given, Controls) else cls(tuple(given or ()))
