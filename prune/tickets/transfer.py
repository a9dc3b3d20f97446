"""The ``transfer`` job: a ticket found on one data set or activation, trained on another."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.start import Start
from prune.tickets.arms import Hunt
from prune.tickets.identity import settings_of
from prune.tickets.lightning import WEIGHTS, LightningTrainee
from prune.tickets.search import trained
from prune.tickets.store import TICKET, Store
from prune.tickets.subject import coupled, subject
from prune.tickets.trainee import Arm
from workbench import records
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.export.inputs import select_level
from workbench.files import sha256
from workbench.launcher.arguments import arguments_of
from workbench.records.lock import locked
from workbench.records.source import Source
from workbench.tasks import Task
from workbench.training.fit import module_for
from workbench.training.module import (
    LRSchedulerCallable,
    OptimizerCallable,
    SupervisedModule,
    network_of,
    with_optimizer,
)
from workbench.training.save import save_network

_KEPT = ("metrics", "monitor", "history", "world_size", "best", "stopped", "density", "layers", "mask_hash")


def transfer(
    start: Source,
    level: int | Literal["winning", "last"] = "winning",
    weights: Literal["rewound", "own"] = "rewound",
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    controls: list[Literal["reinit", "shuffled", "random"]] | None = None,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed_everything: int | None = None,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    out: Path = Path("runs/transfer"),
) -> dict[str, Any]:
    """Train a ticket of a hunt on other data, or under another activation, from its first update to the end.

    Morcos et al. 2019, arXiv:1906.02773; Mehta 2019, arXiv:1905.07785. What is not given here is as in the hunt: its
    network, data, optimizer, trainer and seed, and its teacher, unless model, data or task are given.

    Args:
        start: The hunt.
        level: Which ticket: the sparsest within tolerance (the last level where only the dense network is), or the
            last, or a number.
        weights: The ticket begins with those of the hunt's rewind point, or only its mask is taken, over the own
            initial weights of the network.
        model: The network to train instead: with another activation, or of other classes. Weights of which the hunt's
            network has none of this name and shape, such as those of an output of other classes, keep their own
            initial values and are not pruned.
        data: The data module.
        task: Loss and metrics of a plain network; those of the hunt where its data stay.
        controls: What is trained beside the ticket, from the same start: shuffled has its mask shuffled within each
            layer, random a random mask, and reinit new initial weights under its mask.
        optimizer: Instead of the hunt's.
        lr_scheduler: With the optimizer; stepped once an epoch, constant by default.
        trainer: Arguments of Lightning's Trainer that replace the hunt's.
        seed_everything: Seed of the data order, everything random in training and a network's own initial weights; by
            default the hunt's, and 0 for a `model`.
        checkpoint: How often the checkpoint that a stopped training resumes from is written, e.g. 1ep or 500it.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, history and size, the ticket that it was, what was `left` as it was, and the controls, for the record.

    Raises:
        ValueError: If there is no such ticket, its weights were altered, or nothing of it fits the network.
    """
    place, levels = _ticket(Path(start), level)
    number = levels[-1]["level"]
    given = {"model": model, "data": data, "task": task, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    made = arguments_of(Path(start), {} if seed_everything is None else {"seed_everything": seed_everything})
    module, data, settings, seed = _subject_now(made, **given)
    network = network_of(module)
    before = compact.tensors(place) if weights == "own" else _rewind_point(Path(start), levels[0])
    left = unlike(network, before)
    masks = _fitting(network, compact.masks(place), place, left)
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    if weights == "rewound":
        state |= {name: value for name, value in before.items() if name in state and value.shape == state[name].shape}
    settings = {**settings, **(trainer or {})}
    chosen_here = {"masks": masks.hash(), "weights": weights, "seed": seed}
    chosen_here |= {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    known = settings_of(module, data, settings, of=levels[-1]["mask_hash"], **chosen_here)
    key = (records.read(out) or {}).get("fingerprint") or records.fingerprint(known)
    structure = coupled(module, data) if made["structure"] == "coupled" else made["structure"]
    moved = Hunt(
        LightningTrainee(
            module,
            data,
            settings,
            seed,
            Duration(0, "it"),
            out / "checkpoints",
            checkpoint,
            made["batches"],
            made["early_stop"],
        ),
        Pruner(structure=structure),
        (*(each["density"] for each in levels[:-1]), masks.density),
        Store(out, key, known),
        controls=tuple(controls or ()),
        given=Arm(Start("first", state), masks, seed),
    )
    with locked(out):
        moved.store.check()
        done = {arm: trained(moved, number, arm) for arm in (TICKET, *moved.controls)}
        ticket = done.pop(TICKET)
        moved.trainee.load(moved.store.weights(number))
        last = {name: ticket[name] for name in _KEPT if name in ticket}
        save_network(module, data, out, last, masks)
    return {
        **last,
        "seed": seed,
        "of": {"level": number, "mask_hash": levels[-1]["mask_hash"], "weights": weights},
        "left": left,
        "controls": done,
        "seconds": round(sum(record["seconds"] for record in (ticket, *done.values())), 3),
    }


def unlike(network: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Parameters of ``network`` that ``before``, the state of another one, has none of the same name and shape for."""
    shapes = {name: value.shape for name, value in before.items()}
    return [name for name, parameter in network.named_parameters() if shapes.get(name) != parameter.shape]


def _fitting(network: nn.Module, masks: Mapping[str, Tensor], place: Path, left: Collection[str]) -> Masks:
    """Those masks that are for weights of ``network``.

    Raises:
        ValueError: If none is.
    """
    names = {name for name, _ in network.named_parameters()} - set(left)
    if fitting := {name: mask for name, mask in masks.items() if name in names}:
        return Masks(fitting)
    name, mask = next(iter(masks.items()))
    here = dict(network.named_parameters()).get(name)
    raise ValueError(
        f"{place} prunes nothing that {type(network).__name__} has by name and shape: {name!r} is {tuple(mask.shape)} "
        f"there, {'missing' if here is None else tuple(here.shape)} here; give a model with the layers of that hunt's"
    )


def _ticket(hunt: Path, level: int | str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a ticket, and the records of the levels up to it."""
    record = records.read(hunt) or {}
    if not record.get("levels"):
        raise ValueError(f"{hunt} is no finished hunt: name a stage of job hunt that is finished")
    place, found = select_level(hunt, "last" if level == "winning" and not record.get("winning") else level)
    if not found["level"]:
        raise ValueError(f"level 0 of {hunt} is dense: name one from 1 to {len(record['levels']) - 1}")
    return place, record["levels"][: found["level"] + 1]


def _rewind_point(hunt: Path, dense: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict at the rewind point, as ``dense``, the record of level 0, has its hash."""
    file = hunt / "checkpoints" / WEIGHTS
    remedy = "hunt again, or take only the mask, with weights: own"
    if not file.is_file():
        raise ValueError(f"{file}, the weights at the rewind point, is missing: {remedy}")
    if sha256(file) != dense.get("points", {}).get("weights"):
        raise ValueError(f"{file} was altered: {remedy}")
    return load_file(file)


def _subject_now(
    made: Mapping[str, Any],
    model: nn.Module | None,
    data: LightningDataModule | None,
    task: Task | None,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
) -> tuple[LightningModule, LightningDataModule, Mapping[str, Any], int]:
    """What is trained, on what, how, with which seed: as in the hunt that was given ``made``, but for what is given."""
    plain = {name: made[name] for name in ("model", "task", "optimizer", "lr_scheduler")}
    shared = (made[name] for name in ("start", "data", "trainer", "seed_everything"))
    module, hunted, settings, seed = subject(*shared, **plain)
    if model is None and data is None and task is None:
        return with_optimizer(module, optimizer, lr_scheduler), hunted, settings or {}, seed
    theirs = module if isinstance(module, SupervisedModule) else None
    if model is None:
        model = module if theirs is None else theirs.network
    if not isinstance(model, LightningModule):
        if optimizer is None:
            optimizer, lr_scheduler = made["optimizer"], made["lr_scheduler"]
        if optimizer is None and theirs is not None:
            optimizer, lr_scheduler = theirs.optimizer, theirs.lr_scheduler
        if task is None and data is None and theirs is not None:
            task = theirs.task
    module = module_for(model, data or hunted, task=task, optimizer=optimizer, lr_scheduler=lr_scheduler)
    return module, data or hunted, settings or {}, seed
