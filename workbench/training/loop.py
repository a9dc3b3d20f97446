"""One training from start or checkpoint to the end of its budget, by Lightning's Trainer."""

import copy
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from workbench import progress
from workbench.distributed.ranks import check_world_size
from workbench.distributed.sharding import check_mesh, release, whole_checkpoints
from workbench.duration import Duration
from workbench.randomness import same_random_state
from workbench.tasks import Imitation, Task
from workbench.training.module import (
    SupervisedModule,
)
from workbench.training.order import ordered
from workbench.training.resume import Continuation, History, Resumable, ShowProgress, check_checkpoint, restore_ended
from workbench.training.save import save_family, save_network

_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


# Importing pytorch_lightning beside lightning.pytorch makes it the speaker of both.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


_NOISE = (
    "does not have many workers",
    "smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def train_and_save(
    module: LightningModule,
    data: LightningDataModule,
    trainer: Mapping[str, Any] | None,
    seed: int,
    out: Path,
    checkpoint: Duration,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train ``module``, then write its network, or those of its family, into ``out``; the result for the record."""
    result = train(module, data, trainer=trainer, seed=seed, out=out, checkpoint=checkpoint, start=start)
    masks = result.pop("masks")
    if isinstance(module, SupervisedModule) and module.family:
        save_family(module, data, out, result, masks)
    else:
        save_network(module, data, out, result, masks)
    return result


def evaluated(module: LightningModule, data: LightningDataModule, out: Path) -> dict[str, float]:
    """Metrics of a module that is trained already, on the splits that ``data`` has; none if it imitates a teacher."""
    if isinstance(getattr(module, "task", None), Imitation):
        return {}
    with quiet(progress.current() is not None):
        return _evaluate(make_trainer({"max_epochs": 1}, (), out), module, data)


def train(
    module: LightningModule,
    data: LightningDataModule,
    *,
    trainer: Mapping[str, Any] | None,
    seed: int,
    out: Path,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    start: Path | None = None,
    callbacks: Sequence[Callback] = (),
    part: tuple[int, int, str] = (0, 1, ""),
) -> dict[str, Any]:
    """Train ``module`` to the end of ``trainer``'s budget, from where an earlier call with ``out`` was stopped.

    On CPU the result is the same, bit for bit, however often it was stopped: the order of the data is a function of
    seed and epoch, and checkpoints hold the random state of every rank. Two things are not restored in the middle of an
    epoch, only at its end: random numbers drawn in loader workers, and the place of a loader with a sampler of its own.

    Args:
        module: What is trained, in place.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of the data order and everything random in training.
        out: The folder of ``checkpoints/last.ckpt``.
        checkpoint: How often that is written.
        start: A Lightning checkpoint to start from, if there is none in ``out`` yet.
        callbacks: More of them.
        part: Which of how many trainings of the stage this is, and its label, for the progress bar.

    Returns:
        ``metrics`` of the last epoch's weights on the validation and test splits, ``history`` (a row an epoch),
        ``monitor`` (the main metric and its direction), ``seconds``; and ``masks``, those a callback kept, or None.

    Raises:
        ValueError: If the trainer has no budget, or its world size is not the launcher's.
    """
    if checkpoint.value < 1:
        raise ValueError(f"checkpoint is {checkpoint}: give at least 1ep or 1it")
    began = time.monotonic()
    last = out / "checkpoints" / "last.ckpt"
    history = History()
    ended = out / "checkpoints" / "ended.ckpt"
    own = [*callbacks, Continuation(), history, ShowProgress(*part), Resumable(last, ended, checkpoint)]
    with quiet(progress.current() is not None):
        seed_everything(seed, workers=True, verbose=False)
        made = make_trainer(trainer, own, out)
        meet(made)
        module.train()
        every: list[Callback] = made.callbacks  # type: ignore[attr-defined]
        for found in (ended, last):
            if found.is_file():
                check_checkpoint(found, "remove it to train this from the start; what is finished is kept")
                break
        if ended.is_file():
            restore_ended(ended, module, every)
        else:
            with _ordered(module, data, seed, made):
                made.fit(module, datamodule=data, ckpt_path=last if last.is_file() else start, weights_only=False)
            if made.interrupted:
                raise KeyboardInterrupt
            if made.global_step == 0:
                raise ValueError("training took no step: give max_epochs or max_steps, and batches, above 0")
        metrics = _evaluate(made, module, data)
        release(module)
    return {
        "metrics": metrics,
        "history": history.rows,
        "monitor": list(monitor_of(module)),
        "world_size": made.world_size,
        "seconds": round(time.monotonic() - began, 3),
        "masks": next((found for callback in every if (found := getattr(callback, "masks", None))), None),
    }


def make_trainer(arguments: Mapping[str, Any] | None, callbacks: Sequence[Callback], out: Path) -> Trainer:
    """A Trainer with this project's defaults under ``arguments`` and ``callbacks`` after its own."""
    arguments = dict(arguments or {})
    if arguments.get("max_epochs") is None and arguments.get("max_steps", -1) in (-1, None):
        raise ValueError("trainer has neither max_epochs nor max_steps: say how long to train, e.g. {max_epochs: 10}")
    # One Trainer is made per level of a hunt: each gets callbacks and loggers of its own.
    theirs = copy.deepcopy(arguments.pop("callbacks", None) or [])
    given = {name: copy.deepcopy(value) for name, value in arguments.items() if value is not None}
    defaults = {**_DEFAULTS, "default_root_dir": str(out), "enable_progress_bar": progress.current() is None}
    # Always so: the stage keeps its resume point, and its order is split over the ranks already.
    for name in ("enable_checkpointing", "use_distributed_sampler"):
        given.pop(name, None)
    if isinstance(given.get("strategy"), ModelParallelStrategy):
        given["inference_mode"] = False  # what FSDP2 gathers in it, training could not use
    made = Trainer(**{**defaults, **given}, callbacks=[*_as_list(theirs), *callbacks])
    check_world_size(made.world_size)
    whole_checkpoints(made)
    return made


def meet(trainer: Trainer) -> None:
    """Let the ranks that a launcher such as torchrun has started form their group now, and not at their first fit.

    Before that they would know nothing of each other, and not wait for what rank zero writes. Those that Lightning
    starts itself come to life inside a fit.
    """
    strategy: Any = trainer.strategy
    environment = getattr(strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment) or not getattr(environment, "creates_processes_externally", False):
        return
    if isinstance(strategy, (DDPStrategy, FSDPStrategy)):
        strategy.setup_environment()
    elif isinstance(strategy, ModelParallelStrategy):
        strategy._setup_distributed()  # the rest of its setup asks for the module


def monitor_of(module: nn.Module) -> tuple[str, Literal["min", "max"]]:
    """The main metric, by its name without prefix, and its better direction."""
    task = getattr(module, "task", None)
    return task.monitor if isinstance(task, Task) else ("loss", "min")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _evaluate(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics of the weights as they are now, on the splits that the data module and the module both have."""
    metrics: dict[str, float] = {}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        step = "validation_step" if split == "val" else "test_step"
        if is_overridden(f"{split}_dataloader", data, LightningDataModule) and is_overridden(step, module):
            for row in run(module, datamodule=data, verbose=False):
                metrics.update({name: float(value) for name, value in row.items()})
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        warnings.warn(f"{', '.join(bad)}: not finite after training", stacklevel=3)
    return metrics


def training_loader(module: LightningModule, data: LightningDataModule, seed: int) -> Any:
    """The loader that :func:`train` would train ``module`` on, at its first epoch, for other uses of its batches.

    All ranks have the same batches: what comes of them depends neither on how many ranks there are, nor on whether they
    have met yet.
    """
    data.prepare_data()
    data.setup("fit")
    with same_random_state(seed):
        loader = data.train_dataloader()
        attached = module.attach(loader) if isinstance(module, SupervisedModule) else loader
        return ordered(attached, seed)


@contextmanager
def _ordered(module: LightningModule, data: LightningDataModule, seed: int, trainer: Trainer) -> Iterator[None]:
    """Inside, the data module's training loader is as the module wants it, in an order of (seed, epoch) alone.

    Validation draws nothing from torch's generator, so that training is the same whether and how often there is any.
    """
    original = data.train_dataloader
    attach = module.attach if isinstance(module, SupervisedModule) else (lambda loader: loader)

    def train_dataloader() -> Any:
        check_mesh(module.device_mesh)
        if trainer.overfit_batches:  # type: ignore[attr-defined] - the same few batches every epoch, by Lightning
            return attach(original())
        return ordered(attach(original()), seed, trainer.global_rank, trainer.world_size)

    validate = data.val_dataloader
    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    if is_overridden("val_dataloader", data, LightningDataModule):
        data.val_dataloader = lambda: _apart(validate())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del data.train_dataloader
        vars(data).pop("val_dataloader", None)


def _apart(loader: Any) -> Any:
    """``loader`` with a generator of its own, where it is a plain one without."""
    if type(loader) is DataLoader and loader.generator is None:
        loader.generator = torch.Generator()
    return loader


@contextmanager
def quiet(loggers_too: bool) -> Iterator[None]:
    """Inside, Lightning says only what matters: not, for every level of a hunt, which devices it did not find."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", f".*{message}")
        try:
            for logger in loggers if loggers_too else ():
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
