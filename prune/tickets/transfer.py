"""The ``transfer`` job: a ticket found on one data set or activation, trained on another."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from prune.levels import Levels
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.start import Start
from prune.tickets.arms import Hunt
from prune.tickets.controls import ControlName, Controls
from prune.tickets.identity import settings_of
from prune.tickets.lightning import WEIGHTS, LightningTrainee
from prune.tickets.search import train_arm
from prune.tickets.store import TICKET, Store
from prune.tickets.subject import Subject, coupled, subject
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
    with_optimizer,
)
from workbench.training.save import save_network

_KEPT = (
    *("metrics", "monitor", "history", "world_size", "best", "stopped"),
    *("density", "model_density", "layers", "mask_hash"),
)


def transfer(
    start: Source,
    level: int | Literal["winning", "last"] = "winning",
    weights: Literal["rewound", "own"] = "rewound",
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    controls: list[ControlName] | Controls | None = None,
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
        level: Which ticket: `winning`, the sparsest within tolerance (the last level if only the dense network is);
            `last`; or the number of a level.
        weights: `rewound` starts from the weights of the hunt's rewind point; `own` takes only the mask, on the
            network's own initial weights.
        model: The network to train instead, such as one with another activation or other classes. Weights that the
            hunt's network does not have under the same name and shape, such as those of a new output layer, keep their
            own initial values and are not pruned.
        data: The data module.
        task: Loss and metrics of a plain network; by default the hunt's, if its data is used.
        controls: Which controls are trained beside the ticket, from the same start: reinit, shuffled or random.
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
    folder, levels = _ticket(Path(start), level)
    number = levels[-1]["level"]
    spec = _controls(controls)
    instead = {"model": model, "data": data, "task": task, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    hunted = arguments_of(Path(start), {} if seed_everything is None else {"seed_everything": seed_everything})
    of = _subject(hunted, trainer, **instead)
    before = compact.tensors(folder) if weights == "own" else _rewind_point(Path(start), levels[0])
    left = unlike(of.network, before)
    masks = _fitting(of.network, compact.masks(folder), folder, left)
    state = {name: value.detach().clone() for name, value in of.network.state_dict().items()}
    if weights == "rewound":
        state |= {name: value for name, value in before.items() if name in state and value.shape == state[name].shape}
    settings = settings_of(
        of.module,
        of.network,
        of.data,
        of.trainer,
        of=levels[-1]["mask_hash"],
        masks=masks.hash(),
        weights=weights,
        seed=of.seed,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    key = (records.read(out) or {}).get("fingerprint") or records.fingerprint(settings)
    pruner, early_stop = hunted["pruner"] or Pruner(), Levels.parse(hunted["levels"], hunted["density"]).early_stop
    start_now = Duration(0, "it")
    moved = Hunt(
        LightningTrainee(of, start_now, out / "checkpoints", checkpoint, hunted["batches"], early_stop),
        Pruner(
            structure=coupled(of) if pruner.structure == "coupled" else pruner.structure, allocation=pruner.allocation
        ),
        (*(each["density"] for each in levels[:-1]), masks.density),
        Store(out, key, settings),
        controls=spec,
        ticket=Arm(Start("first", state), masks, of.seed),
    )
    with locked(out):
        moved.store.check()
        done = {arm: train_arm(moved, number, arm) for arm in (TICKET, *spec.names)}
        ticket = done.pop(TICKET)
        moved.trainee.load(moved.store.weights(number))
        last = {name: ticket[name] for name in _KEPT if name in ticket}
        save_network(of.module, of.data, out, last, masks)
    return {
        **last,
        "seed": of.seed,
        "of": {"level": number, "mask_hash": levels[-1]["mask_hash"], "weights": weights},
        "left": left,
        "controls": done,
        "seconds": round(sum(record["seconds"] for record in (ticket, *done.values())), 3),
    }


def _controls(given: list[ControlName] | Controls | None) -> Controls:
    """The controls that a ticket without levels has.

    Raises:
        ValueError: If one needs levels: the dense network trained as long, another hunt's masks, or a barrier.
    """
    controls = Controls.parse(given)
    odd = [name for name in controls.names if name not in ("reinit", "shuffled", "random")]
    if odd or controls.connectivity:
        name = odd[0] if odd else "connectivity"
        raise ValueError(
            f"controls has {name!r}, which needs the levels of a hunt: choose from reinit, shuffled, random"
        )
    return controls


def unlike(network: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Parameters of ``network`` that ``before``, the state of another one, has none of the same name and shape for."""
    shapes = {name: value.shape for name, value in before.items()}
    return [name for name, parameter in network.named_parameters() if shapes.get(name) != parameter.shape]


def _fitting(network: nn.Module, masks: Mapping[str, Tensor], folder: Path, left: Collection[str]) -> Masks:
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
        f"{folder} prunes nothing that {type(network).__name__} has by name and shape: {name!r} is {tuple(mask.shape)} "
        f"there, {'missing' if here is None else tuple(here.shape)} here; give a model with the layers of that hunt's"
    )


def _ticket(hunt: Path, level: int | str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a ticket, and the records of the levels up to it."""
    record = records.read(hunt) or {}
    if not record.get("levels"):
        raise ValueError(f"{hunt} is no finished hunt: name a stage of job hunt that is finished")
    folder, ticket = select_level(hunt, "last" if level == "winning" and not record.get("winning") else level)
    if not ticket["level"]:
        raise ValueError(f"level 0 of {hunt} is dense: name one from 1 to {len(record['levels']) - 1}")
    return folder, record["levels"][: ticket["level"] + 1]


def _rewind_point(hunt: Path, dense: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict at the rewind point, as ``dense``, the record of level 0, has its hash."""
    file = hunt / "checkpoints" / WEIGHTS
    remedy = "hunt again, or take only the mask, with weights: own"
    if not file.is_file():
        raise ValueError(f"{file}, the weights at the rewind point, is missing: {remedy}")
    if sha256(file) != dense.get("points", {}).get("weights"):
        raise ValueError(f"{file} was altered: {remedy}")
    return load_file(file)


def _subject(
    hunted: Mapping[str, Any],
    trainer: Mapping[str, Any] | None,
    model: nn.Module | None,
    data: LightningDataModule | None,
    task: Task | None,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
) -> Subject:
    """The subject of the hunt with the arguments ``hunted``, except for what is given instead."""
    plain = {name: hunted[name] for name in ("model", "task", "optimizer", "lr_scheduler")}
    of = subject(hunted["start"], hunted["data"], hunted["trainer"], hunted["seed_everything"], **plain)
    settings = {**of.trainer, **(trainer or {})}
    if model is None and data is None and task is None:
        return Subject(with_optimizer(of.module, optimizer, lr_scheduler), of.data, settings, of.seed)
    supervised = of.module if isinstance(of.module, SupervisedModule) else None
    if model is None:
        model = of.module if supervised is None else supervised.network
    if not isinstance(model, LightningModule):
        if optimizer is None:
            optimizer, lr_scheduler = hunted["optimizer"], hunted["lr_scheduler"]
        if optimizer is None and supervised is not None:
            optimizer, lr_scheduler = supervised.optimizer, supervised.lr_scheduler
        if task is None and data is None and supervised is not None:
            task = supervised.task
    module = module_for(model, data or of.data, task=task, optimizer=optimizer, lr_scheduler=lr_scheduler)
    return Subject(module, data or of.data, settings, of.seed)
