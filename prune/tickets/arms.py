"""The trainings of a level: the ticket, and the controls that it has to beat.

Every arm says from where, under which masks and with which seed it is trained: a pure function of the hunt's seed and
of what is on disk, the same on every rank. A control of a level is paired with its ticket: the same order of the data,
the same random numbers in training, the same end.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune.allocation import Global, Layers
from prune.criteria import seeded
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.modes import REWINDING, Trained
from prune.rewinding.start import Start
from prune.structures import Layout
from prune.tickets.densities import derived
from prune.tickets.reinit import reinitialised
from prune.tickets.store import TICKET, Store
from prune.tickets.trainee import Arm, Trainee
from workbench import records
from workbench.checkpoints import compact


@dataclass(frozen=True)
class Hunt:
    """What the arms of a hunt share.

    Args:
        trainee: What is trained.
        pruner: Decides the masks.
        densities: Of each level; the first is 1.
        store: The levels on disk.
        rewinding: A name in ``REWINDING``.
        order: Whether every level sees the data in the same order, or in one of its own.
        controls: Names in ``ARMS`` of what is trained beside the ticket, from level 1 on.
        other: Folder of another hunt, whose masks the control ``other`` has.
        fall: How far below level 0 the validation score may fall before the hunt ends.
        patience: For how many levels in a row.
        given: The ticket, where it was found in another hunt; then nothing is rewound.
        study: Masks of the network as it is -> what to record of it.
        connect: Two state dicts of the network -> the barrier between them. With it every ticket has a twin, from level
            0 on, and is compared with it and with the last level.

    Attributes:
        untrained: The network as it was at first, in one piece, for a control with new initial weights.
    """

    trainee: Trainee
    pruner: Pruner
    densities: tuple[float, ...]
    store: Store
    rewinding: str = "all"
    order: Literal["same", "fresh"] = "same"
    controls: tuple[str, ...] = ()
    other: Path | None = None
    fall: float | None = None
    patience: int = 1
    given: Arm | None = None
    study: Callable[[Masks], dict[str, Any]] | None = None
    connect: Callable[[Trained, Trained], dict[str, Any]] | None = None
    untrained: nn.Module | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_names("rewinding", [self.rewinding], REWINDING)
        check_names("order", [self.order], ("same", "fresh"))
        check_names("controls", self.controls, [name for name in ARMS if name != TICKET])
        if not (self.fall or 0) >= 0 or self.patience < 1:
            said = f"fall is {self.fall} and patience {self.patience}"
            raise ValueError(f"{said}: give a fall of 0 or more, and at least 1 level")
        if "reinit" in self.controls:
            object.__setattr__(self, "untrained", copy.deepcopy(self.trainee.network))

    def arms(self, level: int) -> tuple[str, ...]:
        """What is trained at a level, in order."""
        controls = self.controls if level else ()
        return (TICKET, *controls, *(("twin",) if self.connect is not None and "twin" not in controls else ()))

    def part(self, level: int, arm: str) -> tuple[int, int, str]:
        """Which of how many trainings the one of ``arm`` at ``level`` is, and its label, for a progress bar."""
        levels = range(len(self.densities)) if self.given is None else (level,)
        trainings = [(each, name) for each in levels for name in self.arms(each)]
        label = f"level {level}{'' if arm == TICKET else f', {arm}'}, density {self.densities[level]:.1%}"
        return trainings.index((level, arm)), len(trainings), label

    def seed(self, level: int) -> int:
        """Of the data order and everything random at ``level``: the ticket's and its controls' alike."""
        return self.trainee.seed if self.order == "same" or level == 0 else derived(self.trainee.seed, level, "order")


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is none of those known.

    Raises:
        ValueError: Naming it and them.
    """
    if odd := [name for name in given if name not in known]:
        raise ValueError(f"{what} has {odd[0]!r}: choose of {list(known)}")


def ticket(hunt: Hunt, level: int) -> Arm:
    """Level 0 is dense; another one prunes the last one's weights and rewinds."""
    if hunt.given is not None:
        return hunt.given
    if level == 0:
        moments = ("point", "end") if hunt.rewinding == "fine_tuning" else ("point",)
        return Arm(Start("first"), None, hunt.trainee.seed, moments)
    trained = hunt.store.weights(level - 1)
    hunt.trainee.load(trained)
    masks = hunt.trainee.pruned(hunt.pruner, hunt.densities[level], hunt.store.masks(level - 1))
    return Arm(rewound(hunt, trained), masks, hunt.seed(level))


def reinit(hunt: Hunt, level: int) -> Arm:
    """The ticket's mask over new initial weights, trained from the first update: at least as long as the ticket.

    Hunts of the same seed draw the same noise for it, whatever their activation, up to its gain.

    Source: Frankle & Carbin 2019, arXiv:1803.03635, section 2; Frankle et al. 2020, arXiv:1912.05671.
    """
    network = hunt.trainee.network if hunt.untrained is None else hunt.untrained
    weights = reinitialised(network, derived(hunt.trainee.seed, level, "reinit"))
    return Arm(_ordered(hunt, Start("first", weights)), hunt.store.masks(level), hunt.seed(level))


def shuffled(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under a mask that keeps as many units of each layer, but any.

    Units are those of the structure: of N:M as many weights, as the structure allows them.

    Source: Frankle et al. 2021, "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?",
    arXiv:2009.08576 (layerwise shuffling).
    """
    layout, masks = _units(hunt, level)
    alive = layout.unpruned(masks) or {}
    counts = {key: int(units.sum()) for key, units in alive.items()}
    scores = _scores(layout, derived(hunt.trainee.seed, level, "shuffled"))
    kept = layout.select(scores, counts, layout.candidates(scores, None))
    return Arm(began(hunt, level), Masks(layout.spread(kept)), hunt.seed(level))


def random(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under a mask of as many units, drawn anew over all layers together.

    No layer keeps less than the floor of :class:`prune.allocation.Global`.
    """
    layout, masks = _units(hunt, level)
    scores = _scores(layout, derived(hunt.trainee.seed, level, "random"))
    candidates = layout.candidates(scores, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer that was lifted to its floor is no collapse to be told of
        counts = Global()(Layers(scores, _density(layout, masks), candidates))
    kept = layout.select(scores, counts, candidates)
    return Arm(began(hunt, level), Masks(layout.spread(kept)), hunt.seed(level))


def dense(hunt: Hunt, level: int) -> Arm:
    """Never pruned: trained on from its last weights, with all else at the rewind point, as often as the ticket was.

    At level 1 it goes on from level 0, so that after every level it has had as many updates as the hunt up to there;
    under ``early_stop`` each ends by its own scores.
    Where the hunt fine-tunes it goes on as that does, at the last learning rate.

    Source: Renda et al. 2020, arXiv:2003.02389 (its retraining, here without pruning).
    """
    trained = hunt.store.weights(level - 1, TICKET if level == 1 else "dense")
    start = REWINDING["fine_tuning" if hunt.rewinding == "fine_tuning" else "learning_rate"](trained)
    return Arm(_ordered(hunt, start), None, hunt.seed(level))


def other(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under the mask that another hunt in the same network has at this level.

    Raises:
        ValueError: As :func:`theirs`; or if the mask is of another density.
    """
    layout, masks = _units(hunt, level)
    found, folder = theirs(hunt, level), hunt.store.folder(level)
    one, two = _density(layout, found), _density(layout, masks)
    if abs(one - two) * sum(layout.units.values()) > len(layout.units):
        said = f"{_other(hunt, level)} has density {one:.4g}, {folder} {two:.4g}"
        raise ValueError(f"{said}: name a hunt of the same densities")
    return Arm(began(hunt, level), found, hunt.seed(level))


def theirs(hunt: Hunt, level: int) -> Masks:
    """The mask that the other hunt has at a level.

    Raises:
        ValueError: If none is named, it has no such finished level, its mask is of another network, or the control here
            was trained with another one.
    """
    place, folder = _other(hunt, level), hunt.store.folder(level)
    if records.finished(place) is None:
        raise ValueError(f"{place} is no finished level, and {folder} is to have its mask: finish that hunt first")
    found = Masks(compact.masks(place))
    weights = hunt.pruner.scope(hunt.trainee.network)
    shapes, expected = ({name: tuple(each.shape) for name, each in of.items()} for of in (found, weights))
    if odd := [name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name)]:
        said = f"{odd[0]!r} is {shapes.get(odd[0], 'not pruned')} there, {expected.get(odd[0], 'not pruned')} here"
        raise ValueError(f"{place} and {folder} prune different networks: {said}")
    if hunt.store.finished(level, "other") is not None and hunt.store.masks(level, "other") != found:
        raise ValueError(f"{folder / 'other'} was trained under another mask than {place} has: move it aside")
    return found


def check_other(hunt: Hunt) -> None:
    """Make sure, before anything is trained, that the control ``other`` has its masks.

    All of them, or where ``fall`` may end the hunt before the last level, the first.

    Raises:
        ValueError: As :func:`theirs`.
    """
    for level in range(1, len(hunt.densities) if hunt.fall is None else 2) if "other" in hunt.controls else ():
        theirs(hunt, level)


def twin(hunt: Hunt, level: int) -> Arm:
    """The ticket again, from the same point, with another order of the data and other random numbers in training.

    At level 0 the dense network, from the rewind point.

    Source: Frankle et al. 2020, arXiv:1912.05671, section 2 (instability analysis).
    """
    seed = derived(hunt.trainee.seed, level, "twin")
    if level == 0:
        return Arm(Start("point", random=False), None, seed)
    return Arm(replace(began(hunt, level), random=False), hunt.store.masks(level), seed)


def rewound(hunt: Hunt, trained: Trained) -> Start:
    """Where a level starts whose last one ended with the weights ``trained``."""
    return _ordered(hunt, REWINDING[hunt.rewinding](trained))


def began(hunt: Hunt, level: int) -> Start:
    """Where the ticket of a level beyond 0 started."""
    return rewound(hunt, hunt.store.weights(level - 1)) if hunt.given is None else hunt.given.start


def _other(hunt: Hunt, level: int) -> Path:
    if hunt.other is None:
        raise ValueError("the control 'other' is the mask of another hunt, and none is named: give its folder as other")
    return Store(hunt.other, "").folder(level)


def _ordered(hunt: Hunt, start: Start) -> Start:
    return start if hunt.order == "same" else replace(start, random=False)


def _units(hunt: Hunt, level: int) -> tuple[Layout, Masks]:
    """How the structure divides what the ticket's mask is of, and that mask."""
    masks = hunt.store.masks(level)
    weights = {name: hunt.trainee.network.get_parameter(name) for name in masks}
    return hunt.pruner.axes.structure.layout(hunt.trainee.network, weights), masks


def _density(layout: Layout, masks: Masks) -> float:
    """The share of all units that masks keep."""
    return sum(int(units.sum()) for units in (layout.unpruned(masks) or {}).values()) / sum(layout.units.values())


def _scores(layout: Layout, seed: int) -> dict[str, Tensor]:
    """A random number for every unit: not the mean over its weights, by which large units would all be alike."""
    shapes = {
        key: layout.shapes[name] if index is None else (layout.units[key],)
        for name, members in layout.members.items()
        for key, index in members
    }
    return {
        key: torch.rand(tuple(shape), generator=seeded(seed, key), dtype=torch.float64) for key, shape in shapes.items()
    }


ARMS: dict[str, Callable[[Hunt, int], Arm]] = {
    each.__name__: each for each in (ticket, reinit, shuffled, random, dense, other, twin)
}
