"""The ``hunt`` job: lottery tickets by iterative magnitude pruning with rewinding.

A level is a folder: its network and mask as a compact checkpoint, and a record without which it does not exist.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from prune.allocation import LayerwiseAsPaper
from prune.callbacks import EarlyBird
from prune.connectivity import error_barrier
from prune.connectivity.lightning import check_split
from prune.connectivity.states import batch_norms
from prune.levels import Levels
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.tickets.arms import Hunt
from prune.tickets.controls import ControlName, Controls, Interpolation
from prune.tickets.diagnose import diagnose
from prune.tickets.identity import settings_of
from prune.tickets.lightning import LightningTrainee, check_criterion
from prune.tickets.scores import sparsest_winning
from prune.tickets.search import search
from prune.tickets.store import Store
from prune.tickets.subject import Subject, coupled, subject
from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.sharding import load_full_state_dict
from workbench.duration import Duration
from workbench.records.lock import locked
from workbench.records.source import Source
from workbench.tasks import Task
from workbench.training.calibration import batch_runner
from workbench.training.module import LRSchedulerCallable, OptimizerCallable
from workbench.training.save import save_network


def hunt(
    start: Source | None = None,
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    density: float | list[float] | None = None,
    levels: int | Levels | None = None,
    rewind: Duration | Rewind = Duration(1, "ep"),  # noqa: B008 - frozen
    controls: list[ControlName] | Controls | None = None,
    pruner: Pruner | None = None,
    batches: int = 16,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed_everything: int | None = None,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    out: Path = Path("runs/hunt"),
) -> dict[str, Any]:
    """Hunt a lottery ticket: iterative magnitude pruning with rewinding (Frankle & Carbin 2019, Frankle et al. 2020).

    Level 0 trains the dense network and saves the rewind point. Every further level prunes the weights of the previous
    level, goes back to the rewind point and trains the remaining weights to the end. By default weights, optimizer,
    schedulers, counters, random state and data order go back. If `start` is a `distill` stage, every level trains with
    that stage's teacher.

    Args:
        start: A fit or distill stage, whose network is trained again with the stage's data, trainer and seed, unless
            these are given here.
        model: Instead of `start`: a network, or a LightningModule of your own.
        data: The data module.
        task: Loss and metrics of a plain `model`.
        density: Share of the prunable weights to reach, in (0, 1]: the last level is the first at or below it. Or a
            list with the density of every level.
        levels: How many times to prune, instead of `density`; or a mapping that sets how far to prune, in which steps,
            and when to end.
        rewind: The rewind point: 0it is the initial weights, 2ep the end of the second epoch, 500it the 500th update;
            or a mapping that also sets what goes back and the order of the data.
        controls: Which controls are trained beside the ticket at each level; or a mapping that also sets what is
            measured.
        pruner: Selects the weights to prune, by criterion, structure and allocation; by default the smallest magnitudes
            of the whole network. Its random numbers follow from the hunt's seed.
        batches: How many training batches a criterion that needs data is calibrated on.
        optimizer: Instead of that of `start`; for a plain `model` AdamW at 1e-3 by default.
        lr_scheduler: With the optimizer; stepped once an epoch, constant by default.
        trainer: Arguments of Lightning's Trainer for each level.
        seed_everything: Seed of the initial weights, the data order and everything random in training.
        checkpoint: How often the checkpoint that a stopped level resumes from is written, e.g. 1ep or 500it.
        out: The stage's folder, given by the recipe.

    Returns:
        The levels, and metrics, history and size of the last one, for the record.
    """
    spec, rewind, controls = Levels.parse(levels, density), Rewind.parse(rewind), Controls.parse(controls)
    densities = spec.densities()
    given = {"model": model, "task": task, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    of = subject(start, data, trainer, seed_everything, **given)
    pruner = Pruner() if pruner is None else pruner
    selects = pruner_for(pruner, of, spec.rate)
    settings = settings_of(
        of.module,
        of.network,
        of.data,
        of.trainer,
        rate=spec.rate,
        densities=densities,
        early_stop=spec.early_stop,
        rewind=rewind.settings(),
        pruner=replace(pruner, allocation=selects.axes.allocation),
        batches=batches,
        seed=of.seed,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    selects.check(of.network, *densities)
    check_criterion(selects, of.trainer)
    line = controls.interpolation
    for split in line.splits if line else ():
        check_split(of.module, of.data, split)
    if line and batch_norms(of.network):
        batch_runner(of.module)  # refuses a module that steps by hand
    store = Store(out, (records.read(out) or {}).get("fingerprint") or records.fingerprint(settings), settings)
    observed = {store.folder(level): density for level, density in enumerate(densities[1:])}
    if not controls.diagnose or selects.axes.criterion.needs_loader:
        observed = {}
    trainee = LightningTrainee(
        of,
        rewind.point,
        out / "checkpoints",
        checkpoint,
        batches,
        spec.early_stop,
        lambda folder: [EarlyBird(selects, observed[folder])] if folder in observed else [],
    )
    measures: dict[str, Any] = {"diagnose": functools.partial(diagnose, of)} if controls.diagnose else {}
    if line:
        measures["barrier"] = functools.partial(_barriers, of, line)
    hunted = Hunt(trainee, selects, densities, store, rewind, controls, spec.max_drop, spec.patience, **measures)
    with locked(out):
        done = search(hunted)
        folder = store.folder(len(done) - 1)
        load_full_state_dict(of.network, compact.tensors(folder))
        last = {name: done[-1][name] for name in ("metrics", "monitor", "history", "world_size")}
        save_network(of.module, of.data, out, last, Masks(compact.masks(folder)))
    trainings = [each for record in done for each in (record, *record.get("controls", {}).values())]
    seconds = round(sum(record["seconds"] for record in trainings), 3)
    winning = sparsest_winning(done, spec.tolerance)
    found = {"levels": done, "winning": winning, "pruner": settings["pruner"]}
    return {**last, "seed": of.seed, **found, "tolerance": spec.tolerance, "seconds": seconds}


def _barriers(
    of: Subject, line: Interpolation, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Split -> the error barrier between two states of the network."""
    options: dict[str, Any] = {"trainer": of.trainer, "seed": of.seed}
    return {s: error_barrier(of.module, of.data, a, b, line.points, s, **options) for s in line.splits}


def pruner_for(pruner: Pruner, of: Subject, rate: float) -> Pruner:
    """``pruner`` with what a hunt knows: its seed, inputs for the structure ``coupled``, its rate for ``layerwise``."""
    allocation = LayerwiseAsPaper(rate=rate) if pruner.allocation == "layerwise" else pruner.allocation
    structure = coupled(of) if pruner.structure == "coupled" else pruner.structure
    return replace(pruner, structure=structure, allocation=allocation, seed=of.seed)
