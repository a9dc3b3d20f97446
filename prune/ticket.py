"""The hunt for lottery tickets: train, prune the smallest weights, rewind, train again.

A level is a folder: its network and mask as a compact checkpoint, and a record without which it does not exist.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from prune.allocation import LayerwiseAsPaper
from prune.callbacks import KeepMasked
from prune.evidence import evidence
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewind import RewindPoint
from prune.schedule import geometric, levels_to
from prune.shrinking import Coupled
from prune.shrinking.job import given
from workbench import artifact, records
from workbench.arguments import rebuild
from workbench.duration import Duration
from workbench.files import sha256
from workbench.module import LRSchedulerCallable, OptimizerCallable, network_of, with_optimizer
from workbench.randomness import same_random_state
from workbench.ranks import barrier, rank
from workbench.saving import example_inputs, save_network
from workbench.source import Source
from workbench.tasks import Task
from workbench.training import module_for, train, training_loader


def hunt(
    start: Source | None = None,
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    density: float | None = None,
    levels: int | None = None,
    rate: float = 0.2,
    rewind: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
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
        density: Share of the prunable weights to reach, in (0, 1]; gives the number of levels. Or give `levels`.
        levels: How many times to prune.
        rate: Share of the remaining weights pruned at each level.
        rewind: Where each level starts: 0it is the initial weights, 2ep the end of the second epoch, 500it a step.
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
    if (density is None) == (levels is None):
        raise ValueError("give density (e.g. 0.1) or levels (e.g. 10), and only one of them")
    densities = geometric(rate, levels if levels is not None else levels_to(1.0 if density is None else density, rate))
    module, data, trainer, seed = _subject(
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
    chosen = _coupled(module, data) if structure == "coupled" else structure
    pruner = Pruner(criterion, chosen, layers, include=include, exclude=exclude, seed=seed)
    settings = [densities, str(rewind), criterion, structure, allocation, include, exclude, batches, seed]
    key = (records.read(out) or {}).get("fingerprint") or records.fingerprint(settings)
    point = out / "checkpoints" / "rewind.ckpt"
    pruner.check(network, *densities)
    masks = pruner(network, 1.0)
    done: list[dict[str, Any]] = []
    for level, target in enumerate(densities):
        folder = out / f"level_{level:02d}"
        record = _finished(folder, key)
        if record is None:
            began = time.monotonic()
            if level:
                _check_point(point, done[0])
                network.load_state_dict(artifact.tensors(out / f"level_{level - 1:02d}"))
                shown = evidence(pruner.criterion, module, lambda: training_loader(module, data, seed), batches, data)
                with same_random_state(seed):
                    masks = pruner(network, target, within=masks, **shown)
            keeper = KeepMasked(masks) if level else RewindPoint(rewind, point)
            result = train(
                module,
                data,
                trainer=trainer,
                seed=seed,
                out=folder,
                checkpoint=checkpoint,
                start=point if level else None,
                callbacks=[keeper],
                part=(level, len(densities), f"level {level}, density {target:.1%}"),
            )
            if not point.is_file():
                raise ValueError(f"level 0 was stopped before the rewind point {rewind}: rewind to an earlier one")
            del result["masks"]  # level 0 has none, the others these
            masks.apply(network)
            save_network(module, data, folder, result, masks, example=False)
            record = {
                **result,
                "level": level,
                "status": "finished",
                "fingerprint": key,
                "density": masks.density,
                "layers": {name: list(count) for name, count in masks.counts().items()},
                "mask_hash": masks.hash(),
                "seconds": round(time.monotonic() - began, 3),
                "rewind": {"to": str(rewind), "sha256": sha256(point)},
            }
            if rank() == 0:
                records.write(folder, record)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            barrier()
        masks = Masks(artifact.masks(folder))
        done.append(record)
    network.load_state_dict(artifact.tensors(out / f"level_{len(done) - 1:02d}"))
    last = {name: done[-1][name] for name in ("metrics", "monitor", "history", "world_size")}
    save_network(module, data, out, last, masks)
    seconds = round(sum(record["seconds"] for record in done), 3)
    return {**last, "seed": seed, "levels": done, "winning": _winning(done, tolerance), "seconds": seconds}


def _subject(
    start: Source | None,
    data: LightningDataModule | None,
    trainer: Mapping[str, Any] | None,
    seed: int | None,
    **plain: Any,
) -> tuple[LightningModule, LightningDataModule, Mapping[str, Any] | None, int]:
    """What is trained, on what, how, with which seed: of the stage ``start``, or as given."""
    if start is None:
        if plain["model"] is None or data is None:
            raise ValueError("nothing to hunt in: give start (a fit or distill stage), or model and data")
        return module_for(data=data, **plain), data, trainer, seed or 0
    if given := [name for name in ("model", "task") if plain[name] is not None]:
        raise ValueError(f"{', '.join(given)} is given beside start, which brings its own: give one or the other")
    module, made = rebuild(Path(start), {} if seed is None else {"seed_everything": seed})
    if family := getattr(module, "family", ()):
        raise ValueError(
            f"{start} trained a family, {', '.join(family)}: hunt in one network, of a stage that trains it alone"
        )
    module = with_optimizer(module, plain["optimizer"], plain["lr_scheduler"])
    return module, data or made["data"], {**made["trainer"], **(trainer or {})}, made["seed_everything"]


def _coupled(module: LightningModule, data: LightningDataModule) -> Coupled:
    """Channels as the network's connections tie them, traced with inputs of the data module."""
    if not (inputs := example_inputs(module, data)):
        raise ValueError(
            f"structure 'coupled' traces the network with validation inputs, and {type(data).__name__} has none that "
            "are tensors: choose another structure"
        )
    return Coupled(given(network_of(module), inputs))


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a whole level of this hunt, or None.

    Raises:
        ValueError: If the level belongs to another hunt.
    """
    record = records.finished(folder)
    if record is not None and record.get("fingerprint") != key:
        raise ValueError(f"{folder} is a level of another hunt: choose another out, or move it aside")
    return record


def _check_point(point: Path, first: Mapping[str, Any]) -> None:
    """Refuse a rewind point that is not the one level 0 kept."""
    if not point.is_file() or sha256(point) != first["rewind"]["sha256"]:
        state = "was altered" if point.is_file() else "is missing"
        raise ValueError(f"the rewind point {point} {state}: move level_00 aside to train it anew, levels are kept")


def _winning(levels: Sequence[Mapping[str, Any]], tolerance: float) -> int | None:
    """The sparsest level whose validation score is within ``tolerance`` of the dense network's; None without scores."""
    name, mode = levels[0]["monitor"]
    sign = 1 if mode == "max" else -1
    scores = [sign * level["metrics"].get(f"val/{name}", float("nan")) for level in levels]
    if not math.isfinite(scores[0]):
        return None
    return max(level for level, score in enumerate(scores) if score >= scores[0] - tolerance or level == 0)
