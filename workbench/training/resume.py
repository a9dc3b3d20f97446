"""Resuming a stopped training bit for bit: what Lightning's checkpoint leaves out, and files that are whole or absent.

A resume checkpoint is the file that ``Trainer.save_checkpoint`` writes. Restoring happens in this order:

1. Lightning: the module's ``state_dict``, callbacks, optimizers, schedulers, the loops' counters.
2. ``OrderedLoader.state_dict``: epoch and number of batches already seen, so that the epoch goes on with the next one.
3. ``checkpoint["resume"]["random"]``: the random state of every rank, at ``on_train_start``, and once more at
   ``on_train_epoch_start``, because hooks in between may draw numbers.
4. ``checkpoint["resume"]["plateau"]``: the metrics for scheduler steps that were due and not yet taken (see
   :class:`ResumeState`).

Invariants that resuming relies on:

- A checkpoint is written between two optimizer updates, never inside an accumulation window.
- The order of the data is a function of seed and epoch (:mod:`workbench.training.order`), not of the random state.
- The random state is that of the moment of writing, and is set immediately before the next batch is fetched.
- Validation draws nothing from torch's global generator, so that it may run again.
- ``last.ckpt`` and ``ended.ckpt`` are replaced by renaming: a kill leaves the old file or the new one.
"""

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from workbench.distributed.sharding import load_full_state_dict
from workbench.duration import Duration
from workbench.files import path_in_errors, replace_durably
from workbench.randomness import random_state, set_random_state


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write Lightning's checkpoint so that a kill, a power cut or a full disk leaves the old one or the new one, whole.

    Called on every rank.

    Raises:
        OSError: If writing fails; it names ``path``.
    """
    temporary, original_io = path.with_name(f".{path.name}.tmp"), trainer.strategy.checkpoint_io
    try:
        if isinstance(original_io, (TorchCheckpointIO, AsyncCheckpointIO)):
            trainer.strategy.checkpoint_io = DirectCheckpointIO()
        with path_in_errors(path):
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                replace_durably(temporary, path)
    finally:
        trainer.strategy.checkpoint_io = original_io
        if trainer.is_global_zero:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    trainer.strategy.barrier()


def check_checkpoint(path: Path, remedy: str) -> None:
    """Verify the checksums of a file that :func:`save_checkpoint` wrote; torch does not check them when it loads.

    Raises:
        ValueError: If the file is truncated or altered. The message names ``path`` and ends with ``remedy``.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damage = file.testzip()
        torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise errors of many types for a damaged file
        damage = f"{type(error).__name__}: {error}".partition("\n")[0]
    if damage is not None:
        raise ValueError(f"{path} is damaged ({damage}): {remedy}")


@final
class DirectCheckpointIO(CheckpointIO):
    """Writes a checkpoint directly and synchronously to its file.

    Lightning's ``TorchCheckpointIO`` holds a second copy in memory and goes through the system's temporary folder,
    which may be smaller than the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file; Lightning calls this on rank zero."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None  # torch's writer wraps the OSError, which names the reason

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file onto the CPU, or onto ``map_location``."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


def restore_finished(path: Path, module: LightningModule, callbacks: Sequence[Callback]) -> None:
    """Restore module and callbacks from the checkpoint that a training wrote at its end."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    module.on_load_checkpoint(checkpoint)
    load_full_state_dict(module, checkpoint["state_dict"])
    for callback in callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


class ResumeState(Callback):
    """Stores in every checkpoint what Lightning leaves out, and restores it: random state and plateau scheduler steps.

    Lightning steps a ``ReduceLROnPlateau`` after the epoch's checkpoint is written, and not at all in an epoch that was
    resumed in its middle. So the metrics of the missing steps are stored, and the steps taken when training goes on.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._pending_plateau: list[float | None] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state of all ranks. Called on every rank."""
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        checkpoint["resume"] = {"random": states, "plateau": _plateau_steps(trainer) if ended else []}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the stored state until training starts."""
        self._loaded = checkpoint.get("resume")

    def discard(self) -> None:
        """Restore nothing of the loaded checkpoint, because training goes on from another point."""
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore; in the middle of an epoch this is the last hook before the next batch is fetched."""
        _end_epoch(trainer)
        if self._loaded is not None:
            self._restore(trainer)
            self._pending_plateau = self._loaded["plateau"]
            self._step_plateau(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore again at the start of an epoch: the module's ``on_train_start`` may have drawn random numbers."""
        self._step_plateau(trainer)
        self._restore(trainer)
        self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Drop the stored state: a batch has been fetched."""
        self._loaded = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the plateau steps that Lightning will skip."""
        if trainer.fit_loop.restarting:
            self._pending_plateau = _plateau_steps(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._loaded is not None and len(self._loaded["random"]) == trainer.world_size:
            set_random_state(self._loaded["random"][trainer.global_rank])

    def _step_plateau(self, trainer: Trainer) -> None:
        for config, value in zip(trainer.lr_scheduler_configs, self._pending_plateau):
            if value is not None:
                config.scheduler.step(value)  # type: ignore[call-arg]
        self._pending_plateau = []


def _end_epoch(trainer: Trainer) -> None:
    """Count the epoch at whose end the checkpoint was written as completed.

    With ``max_steps`` Lightning 2.6 treats it as unfinished and counts it twice, so that the next epoch would have the
    data of the one after it (`FitLoop.restarting`: ``and`` binds closer than ``or``).
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        # The base class's setter: FitLoop overrides it with the expression that is wrong.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        # The stage of the restart is over; left set, FitLoop would not count the next epoch as ready.
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        loop.epoch_progress.increment_completed()


def _plateau_steps(trainer: Trainer) -> list[float | None]:
    """For each scheduler the metric of its plateau step after this epoch; None if no step is due."""
    steps: list[float | None] = []
    for config in trainer.lr_scheduler_configs:
        due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(config.monitor or "") if config.reduce_on_plateau else None
        steps.append(float(value) if due and value is not None else None)
    return steps


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest checkpoint at one path, replaced atomically, and writes another one when training ends.

    Args:
        path: File of the newest checkpoint.
        ended: File of the final one. While it exists the training is over, by its budget or by an early stop.
        every: Interval in epochs or in optimizer steps.
    """

    def __init__(self, path: Path, ended: Path, every: Duration) -> None:
        self.path, self.ended, self.every = path, ended, every
        self._last = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch, if the interval is in steps."""
        step = trainer.global_step
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every.unit == "it" and step != self._last and step % self.every.value == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        if self.every.unit == "it" or (trainer.current_epoch + 1) % self.every.value == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final checkpoint."""
        save_checkpoint(trainer, self.ended)

    def _save(self, trainer: Trainer) -> None:
        self._last = trainer.global_step
        save_checkpoint(trainer, self.path)
