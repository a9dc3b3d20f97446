"""The hunt for lottery tickets: train, prune the smallest weights, rewind, train again.

A level is a folder: its network and mask as a compact checkpoint, and a record without which it does not exist.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import nn

from prune.allocation import LayerwiseAsPaper
from prune.callbacks import EarlyBird
from prune.connectivity import error_barrier
from prune.connectivity.states import batch_norms
from prune.masks import Masks
from prune.pruner import Pruner
from prune.tickets.arms import Hunt
from prune.tickets.densities import densities_of, scores
from prune.tickets.diagnose import studied
from prune.tickets.identity import settings_of
from prune.tickets.lightning import LightningTrainee, check_criterion
from prune.tickets.search import search
from prune.tickets.store import Store
from prune.tickets.subject import coupled, subject
from workbench import records
from workbench.checkpoints import compact
from workbench.distributed.sharding import load_full_state_dict
from workbench.duration import Duration
from workbench.records.lock import locked
from workbench.records.source import Source
from workbench.tasks import Task
from workbench.training.calibration import batch_runner
from workbench.training.module import LRSchedulerCallable, OptimizerCallable, network_of
from workbench.training.save import save_network


def hunt(
    start: Source | None = None,
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    density: float | list[float] | None = None,
    levels: int | None = None,
    rate: float = 0.2,
    fall: float | None = None,
    patience: int = 1,
    early_stop: int | None = None,
    rewind: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    rewinding: Literal["all", "weights", "learning_rate", "fine_tuning"] = "all",
    order: Literal["same", "fresh"] = "same",
    controls: list[Literal["reinit", "shuffled", "random", "dense"]] | None = None,
    other: Source | None = None,
    connectivity: bool = False,
    diagnose: bool = True,
    criterion: Literal["magnitude", "random", "snip", "grasp", "synflow", "taylor", "movement", "wanda"] = "magnitude",
    structure: str = "unstructured",
    allocation: Literal["global", "uniform", "layerwise", "erk", "erdos_renyi"] = "global",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    batches: int = 16,
    tolerance: float = 0.01,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed_everything: int | None = None,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    out: Path = Path("runs/hunt"),
) -> dict[str, Any]:
    """Hunt a lottery ticket: iterative magnitude pruning with rewinding (Frankle & Carbin 2019, Frankle et al. 2020).

    Level 0 trains dense and keeps the rewind point on its way. Every further level prunes the last one's weights and
    trains what is left from the rewind point to the end, with weights, optimizer, schedulers, counters, random state
    and data order as they were there. With `start` at a `distill` stage, every level has its teacher.

    Args:
        start: A fit or distill stage: train what it trained, with its data, trainer and seed, unless given here.
        model: Instead of `start`: a network, or a LightningModule of your own.
        data: The data module.
        task: Loss and metrics of a plain `model`.
        density: Share of the prunable weights to reach, in (0, 1]; gives the number of levels. A list is the density
            of every level. Or give `levels`.
        levels: How many times to prune.
        rate: Share of the remaining weights pruned at each level.
        fall: End once the validation score has fallen by more than this below level 0's; alone, it decides how far.
        patience: For how many levels in a row it has to have fallen.
        early_stop: End a level after so many validations without a better score, with its best weights; by default
            every level trains to the end.
        rewind: Where each level starts: 0it is the initial weights, 2ep the end of the second epoch, 500it a step.
        rewinding: What goes back there: all; the weights, with fresh optimizer state; learning_rate, all but the
            weights; or with fine_tuning nothing: it trains on at the last learning rate, for as long.
        order: Whether every level sees the data in the same order, or in a fresh one.
        controls: What is trained beside the ticket at each level: reinit has new initial weights under the ticket's
            mask, shuffled its mask shuffled within each layer, random a random mask, and dense is never pruned but
            trained for as many steps as all levels so far, unless early_stop ends it.
        other: Another hunt in the same network, say of another seed: its mask is one more control.
        connectivity: Train every ticket once more with another data order, and measure the error barrier between the
            two, and between each level and the one before (Frankle et al. 2020).
        diagnose: Record dead units and gradient flow of every training, and after each epoch how far the mask that
            would be drawn is from the last epoch's (the early-bird distance of You et al. 2020).
        criterion: What a weight is worth: its magnitude, a random number (the control), or what the loss says of it.
        structure: What stands or falls together: single weights, 2:4 (any N:M), 4x4 (any block), channel, head, ffn,
            balanced, or coupled: channels as the network's connections tie them, which `shrink` takes out.
        allocation: Compare weights over the whole network, or prune each layer alike, or as in the lottery paper, or
            by the layers' shapes.
        include: Name patterns of the weights to prune; all Linear and Conv weights by default.
        exclude: Name patterns of weights to leave alone.
        batches: How many training batches a criterion looks at that looks at data.
        tolerance: Validation score that a level may lose on the dense network and still count as a winning ticket.
        optimizer: Instead of that of `start`; for a plain `model` AdamW at 1e-3 by default.
        lr_scheduler: With the optimizer; stepped once an epoch, constant by default.
        trainer: Arguments of Lightning's Trainer for each level.
        seed_everything: Seed of the initial weights, the data order and everything random in training.
        checkpoint: How often the checkpoint that a stopped level resumes from is written, e.g. 1ep or 500it.
        out: The stage's folder, given by the recipe.

    Returns:
        The levels, and metrics, history and size of the last one, for the record.
    """
    densities = densities_of(density, levels, rate, fall)
    module, data, trainer, seed = subject(
        start,
        data,
        trainer,
        seed_everything,
        model=model,
        task=task,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    network = network_of(module)
    layers = LayerwiseAsPaper(rate=rate) if allocation == "layerwise" else allocation
    chosen = coupled(module, data) if structure == "coupled" else structure
    pruner = Pruner(criterion, chosen, layers, include=include, exclude=exclude, seed=seed)
    pruner.check(network, *densities)
    check_criterion(pruner, trainer)
    if connectivity and batch_norms(network):
        batch_runner(module)  # refuses a module that steps by hand
    given_here = {"rate": rate, "densities": densities, "rewind": str(rewind), "rewinding": rewinding, "order": order}
    given_here |= {"early_stop": early_stop, "criterion": criterion, "structure": structure, "allocation": allocation}
    given_here |= {"include": include, "exclude": exclude, "batches": batches, "seed": seed}
    given_here |= {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    settings = settings_of(module, data, trainer, **given_here)
    key = (records.read(out) or {}).get("fingerprint") or records.fingerprint(settings)
    store = Store(out, key, settings)
    drawn = {store.folder(level): density for level, density in enumerate(densities[1:])}
    birds = drawn if diagnose and not pruner.axes.criterion.needs_loader else {}
    trainee = LightningTrainee(
        module,
        data,
        trainer,
        seed,
        rewind,
        out / "checkpoints",
        checkpoint,
        batches,
        early_stop,
        lambda folder: [EarlyBird(pruner, birds[folder])] if folder in birds else [],
    )
    searched = Hunt(
        trainee,
        pruner,
        densities,
        store,
        rewinding,
        order,
        controls=(*(controls or ()), *(("other",) if other else ())),
        other=None if other is None else Path(other),
        fall=fall,
        patience=patience,
        study=(lambda masks: studied(module, data, masks, seed)) if diagnose else None,
        connect=functools.partial(error_barrier, module, data, trainer=trainer, seed=seed) if connectivity else None,
    )
    with locked(out):
        done = search(searched)
        load_full_state_dict(network, compact.tensors(out / f"level_{len(done) - 1:02d}"))
        last = {name: done[-1][name] for name in ("metrics", "monitor", "history", "world_size")}
        save_network(module, data, out, last, Masks(compact.masks(out / f"level_{len(done) - 1:02d}")))
    seconds = round(sum(record["seconds"] for record in done), 3)
    return {**last, "seed": seed, "levels": done, "winning": _winning(done, tolerance), "seconds": seconds}


def _winning(levels: Sequence[Mapping[str, Any]], tolerance: float) -> int | None:
    """The sparsest level whose validation score is within ``tolerance`` of the dense network's; None without scores."""
    dense, *_ = found = scores(levels)
    if not math.isfinite(dense):
        return None
    return max(level for level, score in enumerate(found) if score >= dense - tolerance or level == 0)
