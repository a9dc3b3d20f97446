"""What a hunt trains and measures beside the ticket."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.records.source import Source

ControlName = Literal["reinit", "shuffled", "random", "dense", "twin"]
CONTROLS = ("reinit", "shuffled", "random", "dense", "twin")


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
            two, and between each level and the previous one (Frankle et al. 2020). Only for `hunt`.
        diagnose: Record dead units and gradient flow of every training, and after each epoch the distance between the
            mask that would be selected now and that of the previous epoch (the early-bird distance of You et al. 2020).
            Only for `hunt`.

    Raises:
        ValueError: If an arm is none of these.
    """

    arms: tuple[ControlName, ...] = ()
    other: Source | None = None
    connectivity: bool = False
    diagnose: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(self.arms))
        if unknown := [name for name in self.arms if name not in CONTROLS]:
            hint = ": give the hunt whose mask it has as controls.other" if unknown[0] == "other" else ""
            raise ValueError(f"controls has {unknown[0]!r}{hint}: choose from {list(CONTROLS)}")

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
