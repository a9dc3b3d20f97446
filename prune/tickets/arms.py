"""The trainings of a level: the ticket, and the controls that it has to beat.

An arm is a function ``(hunt, level) -> Arm``: from where, under which masks and with which seed it is trained. It
depends on nothing but the hunt's seed and what is on disk, and is the same on every rank. A control is paired with the
ticket of its level: the same order of the data, the same random numbers in training, the same end.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune.allocation import Global, Layers
from prune.criteria import seeded
from prune.masks import Masks
from prune.masks.enforce import masked_parameters
from prune.pruner import Pruner
from prune.pruner.norms import keep_norms
from prune.rewinding.modes import MODES, Rewind, StateDict, start_of
from prune.rewinding.start import Start
from prune.structures import Layout
from prune.tickets.controls import Controls
from prune.tickets.reinit import reinitialised
from prune.tickets.store import TICKET, Store
from prune.tickets.trainee import Arm, Trainee
from workbench import records
from workbench.checkpoints import compact
from workbench.models.copying import copied
from workbench.models.matrices import matrices


@dataclass(frozen=True)
class Hunt:
    """What the arms of a hunt share.

    Args:
        trainee: What is trained.
        pruner: Selects the masks.
        densities: Of each level; the first is 1.
        store: The levels on disk.
        rewind: What goes back when a level begins, and whether levels share the order of the data.
        controls: What is trained beside the ticket.
        max_drop: How far below level 0 the validation score may drop before the hunt ends; None for no bound.
        patience: For how many levels in a row.
        ticket: The ticket, where another hunt found it; then nothing is rewound.
        diagnose: Masks of the network as it is -> what to record of it.
        barrier: Two state dicts of the network -> the error barrier between them, by split. With it every level from 0
            on has a twin, and is compared with it and with the level before.

    Attributes:
        untrained: The network as it was at first, in one piece, for a control with new initial weights.
    """

    trainee: Trainee
    pruner: Pruner
    densities: tuple[float, ...]
    store: Store
    rewind: Rewind = field(default_factory=Rewind)
    controls: Controls = field(default_factory=Controls)
    max_drop: float | None = None
    patience: int = 1
    ticket: Arm | None = None
    diagnose: Callable[[Masks], dict[str, Any]] | None = None
    barrier: Callable[[StateDict, StateDict], dict[str, Any]] | None = None
    untrained: nn.Module | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if "reinit" in self.controls.names:
            object.__setattr__(self, "untrained", copied(self.trainee.network))

    def arms(self, level: int) -> tuple[str, ...]:
        """Names of what is trained at a level, in order."""
        controls = self.controls.names if level else ()
        return (TICKET, *controls, *(("twin",) if self.barrier is not None and "twin" not in controls else ()))

    def part(self, level: int, arm: str) -> tuple[int, int, str]:
        """Which of how many trainings the one of ``arm`` at ``level`` is, and its label, for a progress bar."""
        levels = range(len(self.densities)) if self.ticket is None else (level,)
        trainings = [(each, name) for each in levels for name in self.arms(each)]
        label = f"level {level}{'' if arm == TICKET else f', {arm}'}, density {self.densities[level]:.1%}"
        return trainings.index((level, arm)), len(trainings), label

    def seed(self, level: int) -> int:
        """Of the data order and everything random at ``level``: the same for the ticket and its controls."""
        same = self.rewind.order == "same" or level == 0
        return self.trainee.seed if same else derived_seed(self.trainee.seed, level, "order")


def derived_seed(seed: int, *names: str | int) -> int:
    """A seed for the purpose that ``names`` say: the same in every hunt of the same seed, whatever else it does."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def ticket(hunt: Hunt, level: int) -> Arm:
    """Level 0 is dense; every other level prunes the weights of the level before and rewinds."""
    if hunt.ticket is not None:
        return hunt.ticket
    if level == 0:
        saves = ("point", "end") if MODES[hunt.rewind.mode].moment == "end" else ("point",)
        return Arm(Start("first"), None, hunt.trainee.seed, saves)
    trained = hunt.store.weights(level - 1)
    hunt.trainee.load(trained)
    masks = hunt.trainee.select_masks(hunt.pruner, hunt.densities[level], hunt.store.masks(level - 1))
    return Arm(_start(hunt, trained), masks, hunt.seed(level))


def reinit(hunt: Hunt, level: int) -> Arm:
    """The ticket's mask over new initial weights, trained from the first update: at least as long as the ticket.

    Hunts of the same seed draw the same noise for it, whatever their activation, up to its gain.

    Source: Frankle & Carbin 2019, arXiv:1803.03635, section 2; Frankle et al. 2020, arXiv:1912.05671.
    """
    network = hunt.trainee.network if hunt.untrained is None else hunt.untrained
    weights = reinitialised(network, derived_seed(hunt.trainee.seed, level, "reinit"))
    return Arm(_in_order(hunt, Start("first", weights)), hunt.store.masks(level), hunt.seed(level))


def shuffled(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under a mask that keeps as many units of each layer, but any.

    Units are those of the structure: of N:M as many weights, as the structure allows them.

    Source: Frankle et al. 2021, "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?",
    arXiv:2009.08576 (layerwise shuffling).
    """
    layout, masks = _units(hunt, level)
    alive = layout.unpruned(masks) or {}
    counts = {key: int(units.sum()) for key, units in alive.items()}
    scores = _scores(hunt, layout, derived_seed(hunt.trainee.seed, level, "shuffled"))
    kept = layout.select(scores, counts, layout.candidates(scores, None))
    return Arm(ticket_start(hunt, level), Masks(layout.spread(kept)), hunt.seed(level))


def random(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under a mask of as many units, drawn anew over all layers together.

    No layer keeps less than the floor of :class:`prune.allocation.Global`: that of the pruner's own allocation, if it
    is one.
    """
    layout, masks = _units(hunt, level)
    scores = _scores(hunt, layout, derived_seed(hunt.trainee.seed, level, "random"))
    candidates = layout.candidates(scores, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer lifted to its floor is no collapse
        counts = _global(hunt.pruner)(Layers(scores, _density(layout, masks), candidates))
    kept = layout.select(scores, counts, candidates)
    return Arm(ticket_start(hunt, level), Masks(layout.spread(kept)), hunt.seed(level))


def dense(hunt: Hunt, level: int) -> Arm:
    """Never pruned: trained on from its last weights, with all else at the rewind point, as often as the ticket was.

    At level 1 it goes on from level 0, so that after every level it has had as many updates as the hunt up to there;
    under ``early_stop`` each ends by its own scores.
    Where the hunt fine-tunes it goes on as that does, at the last learning rate.

    Source: Renda et al. 2020, arXiv:2003.02389 (its retraining, here without pruning).
    """
    trained = hunt.store.weights(level - 1, TICKET if level == 1 else "dense")
    start = start_of("fine_tuning" if hunt.rewind.mode == "fine_tuning" else "learning_rate", trained)
    return Arm(_in_order(hunt, start), None, hunt.seed(level))


def other(hunt: Hunt, level: int) -> Arm:
    """The ticket's start under the mask that another hunt in the same network has at this level.

    Raises:
        ValueError: As :func:`other_masks`; or if the mask is of another density.
    """
    layout, masks = _units(hunt, level)
    masks_of_other, folder = other_masks(hunt, level), hunt.store.folder(level)
    one, two = _density(layout, masks_of_other), _density(layout, masks)
    if abs(one - two) * sum(layout.units.values()) > len(layout.units):
        raise ValueError(
            f"{_other_folder(hunt, level)} has density {one:.4g}, {folder} {two:.4g}: name a hunt of the same densities"
        )
    return Arm(ticket_start(hunt, level), masks_of_other, hunt.seed(level))


def other_masks(hunt: Hunt, level: int) -> Masks:
    """The masks of the hunt ``controls.other`` at a level.

    Raises:
        ValueError: If it has no such finished level, its masks are of another network, or the control here was trained
            under other ones.
    """
    source, folder = _other_folder(hunt, level), hunt.store.folder(level)
    if records.finished(source) is None:
        raise ValueError(f"{source} is no finished level, and {folder} is to have its mask: finish that hunt first")
    masks = Masks(compact.masks(source))
    weights = hunt.pruner.scope(hunt.trainee.network)
    there, here = ({name: tuple(each.shape) for name, each in of.items()} for of in (masks, weights))
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            shapes = f"{there.get(name, 'not pruned')} there, {here.get(name, 'not pruned')} here"
            raise ValueError(f"{source} and {folder} prune different networks: {name!r} is {shapes}")
    if hunt.store.finished(level, "other") is not None and hunt.store.masks(level, "other") != masks:
        raise ValueError(f"{folder / 'other'} was trained under another mask than {source} has: move it aside")
    return masks


def check_other(hunt: Hunt) -> None:
    """Make sure, before anything is trained, that the control ``other`` has its masks.

    All of them; where ``max_drop`` may end the hunt before its last level, those of level 1.

    Raises:
        ValueError: As :func:`other_masks`.
    """
    for level in range(1, len(hunt.densities) if hunt.max_drop is None else 2) if hunt.controls.other else ():
        other_masks(hunt, level)


def twin(hunt: Hunt, level: int) -> Arm:
    """The ticket again, from the same point, with another order of the data and other random numbers in training.

    At level 0 the dense network, from the rewind point.

    Source: Frankle et al. 2020, arXiv:1912.05671, section 2 (instability analysis).
    """
    seed = derived_seed(hunt.trainee.seed, level, "twin")
    if level == 0:
        return Arm(Start("point", random=False), None, seed)
    return Arm(replace(ticket_start(hunt, level), random=False), hunt.store.masks(level), seed)


def ticket_start(hunt: Hunt, level: int) -> Start:
    """Where the ticket of a level beyond 0 started."""
    return _start(hunt, hunt.store.weights(level - 1)) if hunt.ticket is None else hunt.ticket.start


def _start(hunt: Hunt, trained: StateDict) -> Start:
    """Where a level starts; ``trained`` are the weights at the end of the level before."""
    return _in_order(hunt, start_of(hunt.rewind.mode, trained))


def _other_folder(hunt: Hunt, level: int) -> Path:
    assert hunt.controls.other, "Controls has the arm only with a hunt"
    return Store(Path(hunt.controls.other), "").folder(level)


def _in_order(hunt: Hunt, start: Start) -> Start:
    """``start``, with random state from the level's seed where every level has an order of its own."""
    return start if hunt.rewind.order == "same" else replace(start, random=False)


def _units(hunt: Hunt, level: int) -> tuple[Layout, Masks]:
    """How the structure divides what the ticket's mask is of, and that mask."""
    masks = hunt.store.masks(level)
    weights = masked_parameters(masks, hunt.trainee.network)
    return hunt.pruner.axes.structure.layout(hunt.trainee.network, weights), masks


def _density(layout: Layout, masks: Masks) -> float:
    """The share of all units that masks keep."""
    return sum(int(units.sum()) for units in (layout.unpruned(masks) or {}).values()) / sum(layout.units.values())


def _global(pruner: Pruner) -> Global:
    allocation = pruner.axes.allocation
    return allocation if isinstance(allocation, Global) else Global()


def _scores(hunt: Hunt, layout: Layout, seed: int) -> dict[str, Tensor]:
    """A random number for every unit: not the mean over its weights, by which large units would all be alike.

    Under ``weight_norm`` the highest of every output is infinite: it is kept, as in the ticket.
    """
    shapes = {
        key: layout.shapes[name] if index is None else (layout.units[key],)
        for name, members in layout.members.items()
        for key, index in members
    }
    scores = {
        key: torch.rand(tuple(shape), generator=seeded(seed, key), dtype=torch.float64) for key, shape in shapes.items()
    }
    return keep_norms(matrices(hunt.trainee.network), layout, scores, None)


ARMS: dict[str, Callable[[Hunt, int], Arm]] = {
    each.__name__: each for each in (ticket, reinit, shuffled, random, dense, other, twin)
}
