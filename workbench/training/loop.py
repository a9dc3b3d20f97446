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
from workbench.distributed.sharding import check_mesh, reshard, use_full_checkpoints
from workbench.duration import Duration
from workbench.randomness import same_random_state
from workbench.tasks import Imitation, Task
from workbench.training.callbacks import History, ShowProgress
from workbench.training.module import (
    SupervisedModule,
)
from workbench.training.order import with_epoch_order
from workbench.training.resume import ResumeCheckpoint, ResumeState, check_checkpoint, restore_finished
from workbench.training.save import save_family, save_network
from workbench.training.scoring import scored_in_float32

_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


# Once pytorch_lightning is imported too, messages of both come from its loggers.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


_IGNORED_WARNINGS = (
    "does not have many workers",
    "smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def train_and_save(module: LightningModule, data: LightningDataModule, out: Path, **options: Any) -> dict[str, Any]:
    """Train ``module`` with the ``options`` of :func:`train`, then write its network, or its family's, into ``out``."""
    result = train(module, data, out=out, **options)
    masks = result.pop("masks")
    if isinstance(module, SupervisedModule) and module.family:
        save_family(module, data, out, result, masks)
    else:
        save_network(module, data, out, result, masks)
    return result


def evaluate(module: LightningModule, data: LightningDataModule, out: Path) -> dict[str, float]:
    """Metrics of a trained module on the splits that ``data`` has; empty if its task imitates a teacher."""
    if isinstance(getattr(module, "task", None), Imitation):
        return {}
    with quiet_lightning(progress.current() is not None):
        return _metrics(make_trainer({"max_epochs": 1}, (), out), module, data)


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
    """Train ``module`` to the end of ``trainer``'s budget, resuming what an earlier call with ``out`` began.

    On CPU the result is the same, bit for bit, however often training was stopped: the order of the data is a function
    of seed and epoch, and checkpoints hold the random state of every rank. Two things are restored at the end of an
    epoch only: random numbers drawn in loader workers, and the position of a loader with a custom sampler.

    Args:
        module: Trained in place.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of the data order and of every random draw in training.
        out: Folder of ``checkpoints/last.ckpt``.
        checkpoint: Interval between writes of that file.
        start: A Lightning checkpoint to start from, unless ``out`` has one.
        callbacks: Additional callbacks.
        part: Index and number of the stage's trainings, and a label, for the progress bar.

    Returns:
        ``metrics`` of the last epoch's weights on the validation and test splits, computed in float32, ``history`` (a
        row an epoch), ``monitor`` (the main metric and its direction), ``world_size``, ``seconds``; and ``masks`` of a
        callback, or None.

    Raises:
        ValueError: If the trainer has no budget, or its world size is not the launcher's.
    """
    if checkpoint.value < 1:
        raise ValueError(f"checkpoint is {checkpoint}: give at least 1ep or 1it")
    began = time.monotonic()
    last = out / "checkpoints" / "last.ckpt"
    history = History()
    ended = out / "checkpoints" / "ended.ckpt"
    own = [*callbacks, ResumeState(), history, ShowProgress(*part), ResumeCheckpoint(last, ended, checkpoint)]
    with quiet_lightning(progress.current() is not None):
        seed_everything(seed, workers=True, verbose=False)
        lightning_trainer = make_trainer(trainer, own, out)
        init_process_group(lightning_trainer)
        module.train()
        all_callbacks: list[Callback] = lightning_trainer.callbacks  # type: ignore[attr-defined]
        for file in (ended, last):
            if file.is_file():
                check_checkpoint(file, "remove it to train this from the start; what is finished is kept")
                break
        if ended.is_file():
            restore_finished(ended, module, all_callbacks)
        else:
            with _epoch_ordered(module, data, seed, lightning_trainer):
                lightning_trainer.fit(
                    module, datamodule=data, ckpt_path=last if last.is_file() else start, weights_only=False
                )
            if lightning_trainer.interrupted:
                raise KeyboardInterrupt
            if lightning_trainer.global_step == 0:
                raise ValueError("training took no step: give max_epochs or max_steps, and batches, above 0")
        metrics = _metrics(lightning_trainer, module, data)
        reshard(module)
    return {
        "metrics": metrics,
        "history": history.rows,
        "monitor": list(monitor_of(module)),
        "world_size": lightning_trainer.world_size,
        "seconds": round(time.monotonic() - began, 3),
        "masks": next((masks for callback in all_callbacks if (masks := getattr(callback, "masks", None))), None),
    }


def make_trainer(arguments: Mapping[str, Any] | None, callbacks: Sequence[Callback], out: Path) -> Trainer:
    """A Trainer with this project's defaults under ``arguments`` and ``callbacks`` after its own."""
    arguments = dict(arguments or {})
    if arguments.get("max_epochs") is None and arguments.get("max_steps", -1) in (-1, None):
        raise ValueError("trainer has neither max_epochs nor max_steps: say how long to train, e.g. {max_epochs: 10}")
    # A hunt makes one Trainer per level from the same arguments: each needs its own callbacks and loggers.
    user_callbacks = copy.deepcopy(arguments.pop("callbacks", None) or [])
    options = {name: copy.deepcopy(value) for name, value in arguments.items() if value is not None}
    defaults = {**_DEFAULTS, "default_root_dir": str(out), "enable_progress_bar": progress.current() is None}
    # Not the user's to set: ResumeCheckpoint writes checkpoints, and the data order is split over ranks already.
    for name in ("enable_checkpointing", "use_distributed_sampler"):
        options.pop(name, None)
    if isinstance(options.get("strategy"), ModelParallelStrategy):
        options["inference_mode"] = False  # tensors that FSDP2 gathers in inference mode cannot be trained afterwards
    lightning_trainer = Trainer(**{**defaults, **options}, callbacks=[*_as_list(user_callbacks), *callbacks])
    check_world_size(lightning_trainer.world_size)
    use_full_checkpoints(lightning_trainer)
    return lightning_trainer


def init_process_group(trainer: Trainer) -> None:
    """Initialise the process group of ranks that a launcher such as torchrun started now, not at their first fit.

    Until then ranks could not wait for files that rank zero writes. Ranks that Lightning starts itself exist only
    inside a fit.
    """
    strategy: Any = trainer.strategy
    environment = getattr(strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment) or not getattr(environment, "creates_processes_externally", False):
        return
    if isinstance(strategy, (DDPStrategy, FSDPStrategy)):
        strategy.setup_environment()
    elif isinstance(strategy, ModelParallelStrategy):
        # Private: the public setup_environment goes on to set up the module, which does not exist yet.
        strategy._setup_distributed()


def monitor_of(module: nn.Module) -> tuple[str, Literal["min", "max"]]:
    """Name of the main metric, without prefix, and the direction that is better."""
    task = getattr(module, "task", None)
    return task.monitor if isinstance(task, Task) else ("loss", "min")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _metrics(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics of the current weights, in float32, on the splits that the data module and the module both have."""
    metrics: dict[str, float] = {}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        step = "validation_step" if split == "val" else "test_step"
        if is_overridden(f"{split}_dataloader", data, LightningDataModule) and is_overridden(step, module):
            with scored_in_float32(trainer, module):
                rows = run(module, datamodule=data, verbose=False)
            metrics.update({name: float(value) for row in rows for name, value in row.items()})
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        warnings.warn(f"{', '.join(bad)}: not finite after training", stacklevel=3)
    return metrics


def training_loader(module: LightningModule, data: LightningDataModule, seed: int) -> Any:
    """The loader of the first epoch that :func:`train` would train ``module`` on, for other uses of its batches.

    Every rank gets the same batches, so results depend neither on the number of ranks nor on the process group.
    """
    data.prepare_data()
    data.setup("fit")
    with same_random_state(seed):
        loader = data.train_dataloader()
        attached = module.attach(loader) if isinstance(module, SupervisedModule) else loader
        return with_epoch_order(attached, seed)


@contextmanager
def _epoch_ordered(module: LightningModule, data: LightningDataModule, seed: int, trainer: Trainer) -> Iterator[None]:
    """Inside, the training loader is attached to the module and ordered by (seed, epoch) alone.

    Validation draws nothing from torch's global generator, so that training does not depend on how often it runs.
    """
    original = data.train_dataloader
    attach = module.attach if isinstance(module, SupervisedModule) else (lambda loader: loader)

    def train_dataloader() -> Any:
        check_mesh(module.device_mesh)
        if trainer.overfit_batches:  # type: ignore[attr-defined] - Lightning repeats the same few batches
            return attach(original())
        return with_epoch_order(attach(original()), seed, trainer.global_rank, trainer.world_size)

    validate = data.val_dataloader
    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    if is_overridden("val_dataloader", data, LightningDataModule):
        data.val_dataloader = lambda: _with_own_generator(validate())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del data.train_dataloader
        vars(data).pop("val_dataloader", None)


def _with_own_generator(loader: Any) -> Any:
    """``loader``, if it is a plain DataLoader without a generator, with a new one."""
    if type(loader) is DataLoader and loader.generator is None:
        loader.generator = torch.Generator()
    return loader


@contextmanager
def quiet_lightning(loggers_too: bool) -> Iterator[None]:
    """Inside, Lightning's routine warnings are ignored, and if ``loggers_too`` its info messages, e.g. of devices."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", f".*{message}")
        try:
            for logger in loggers if loggers_too else ():
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
