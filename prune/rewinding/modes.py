"""What goes back to the rewind point when a level begins: one table, which every driver follows."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from prune.masks.stepping import unwrap_optimizer
from prune.rewinding.snapshot import Snapshot, several
from prune.rewinding.start import Start
from workbench.duration import Duration

StateDict = Mapping[str, Tensor]
Groups = list[dict[str, Any]]
ModeName = Literal["all", "weights", "learning_rate", "fine_tuning"]

BACK, STAYS, EMPTY = "goes back", "stays", "starts empty"


class Mode(NamedTuple):
    """What happens to each part of a training when a level begins: ``BACK``, ``STAYS`` or ``EMPTY``.

    A part that goes back is as it was at the rewind point. One that stays is as training left it: weights as at the end
    of the level before, everything else as at the end of level 0.
    """

    weights: str = BACK
    buffers: str = BACK
    optimizers: str = BACK
    schedulers: str = BACK
    counters: str = BACK
    random_state: str = BACK
    data_order: str = BACK

    @property
    def moment(self) -> Literal["point", "end"]:
        """Where training is taken up: at the rewind point, or at the end of level 0."""
        return "end" if self.counters == STAYS else "point"

    def returns(self, part: str) -> bool:
        """Whether a part goes back, by its name as in a :class:`~prune.rewinding.snapshot.Snapshot`."""
        # The gradient scaler counts steps, as a schedule does.
        return getattr(self, "schedulers" if part == "scaler" else part.replace(" ", "_"), BACK) == BACK


MODES: dict[str, Mode] = {
    "all": Mode(),
    "weights": Mode(optimizers=EMPTY),
    "learning_rate": Mode(weights=STAYS, buffers=STAYS),
    "fine_tuning": Mode(*[STAYS] * len(Mode._fields)),
}
"""Frankle et al. 2020, arXiv:1912.05671 (``all``); Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning in
Neural Network Pruning", 2020, arXiv:2003.02389 (the others). Fine-tuning holds the last learning rate of level 0, and
trains for as long as a level of the other modes."""


@dataclass(frozen=True)
class Rewind:
    """Where every level after level 0 starts, and what goes back there.

    A bare duration, ``rewind: 2ep``, is ``{at: 2ep}``.

    Args:
        at: The rewind point: this many epochs (2ep) or optimizer updates (500it) into level 0; 0it is the initial
            weights.
        mode: What goes back there. `all`: everything. `weights`: everything, but the optimizer's state starts empty.
            `learning_rate`: everything but weights and buffers. `fine_tuning`: nothing; training goes on at the last
            learning rate of level 0, for as many updates as a level has in the other modes.
        order: Whether all levels use the same order of the data and the same random numbers, or each its own (fresh).

    Raises:
        ValueError: If a value is none of these.
    """

    at: Duration | str = Duration(1, "ep")  # noqa: RUF009 - frozen
    mode: ModeName = "all"
    order: Literal["same", "fresh"] = "same"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", Duration.parse(self.at))
        for name, allowed in (("mode", list(MODES)), ("order", ["same", "fresh"])):
            if getattr(self, name) not in allowed:
                raise ValueError(f"rewind.{name} is {getattr(self, name)!r}: choose one of {allowed}")

    @property
    def point(self) -> Duration:
        """``at``, parsed."""
        return Duration.parse(self.at)

    def settings(self) -> dict[str, str]:
        """As plain values, for a record or a fingerprint."""
        return {"at": str(self.at), "mode": self.mode, "order": self.order}

    @classmethod
    def parse(cls, given: "str | Duration | Rewind") -> "Rewind":
        """A bare duration, or all of it.

        Raises:
            ValueError: If a text is no duration.
        """
        return given if isinstance(given, Rewind) else cls(given)


def table() -> str:
    """The modes as a Markdown table, for the documentation."""
    names = [name.replace("_", " ") for name in Mode._fields]
    lines = [["`rewind.mode`", *names], ["---"] * (len(names) + 1)]
    lines += [[f"`{name}`", *mode] for name, mode in MODES.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def start_of(mode: str, trained: StateDict) -> Start:
    """Where a level starts in a hunt that trains every level anew.

    Args:
        mode: A name in ``MODES``.
        trained: State dict at the end of the level before.
    """
    row = MODES[mode]
    weights = None if row.weights == BACK else trained
    return Start(row.moment, weights, optimizer=row.optimizers != EMPTY)


def restore(
    point: Snapshot, mode: str, model: nn.Module, optimizers: Any = None, schedulers: Any = None, scaler: Any = None
) -> None:
    """Put a training that goes on in the same process where its next level starts.

    Args:
        point: Of the mode's moment: the rewind point, or for ``fine_tuning`` the end of level 0.
        mode: A name in ``MODES``.
        model: As for :meth:`Snapshot.restore`, like the others.
        optimizers: All that step it.
        schedulers: Their learning-rate schedulers.
        scaler: The gradient scaler.
    """
    row = MODES[mode]
    parts = [part for part in point.what if part not in ("weights", "buffers") or row.returns(part)]
    given = {"optimizers": optimizers, "schedulers": schedulers, "scaler": scaler}
    point.restore(model, **{name: value for name, value in given.items() if name in parts}, parts=parts)
    # An optimizer whose state is emptied still has the learning rates and momenta of the point in its groups.
    for optimizer in several(optimizers) if row.optimizers == EMPTY else ():
        unwrap_optimizer(optimizer).state.clear()


def groups_of(optimizer: Any) -> Groups:
    """The hyperparameters of each of the optimizer's groups (learning rate, momentum, ...), copied; no parameters."""
    groups = unwrap_optimizer(optimizer).param_groups
    return [{name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in groups]


def hold(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the optimizer's groups the hyperparameters that :func:`groups_of` copied, against any schedule.

    Raises:
        ValueError: If it has another number of groups.
    """
    live = unwrap_optimizer(optimizer).param_groups
    if len(live) != len(groups):
        raise ValueError(f"the optimizer has {len(live)} groups, {len(groups)} were kept: give one that was made alike")
    for group, saved in zip(live, groups):
        group.update(copy.deepcopy(dict(saved)))
