"""Callbacks that make a stopped training go on as if it had not stopped: random state, history, checkpoints."""

import time
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
from torch import Tensor

from workbench import progress
from workbench.distributed.sharding import load_whole
from workbench.duration import Duration
from workbench.files import path_in_errors, replace_durably
from workbench.randomness import random_state, set_random_state


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write Lightning's checkpoint so that a kill, a power cut or a full disk leaves the old one or the new one, whole.

    Called on every rank.

    Raises:
        OSError: If writing fails; it names ``path``.
    """
    temporary, theirs = path.with_name(f".{path.name}.tmp"), trainer.strategy.checkpoint_io
    try:
        if isinstance(theirs, (TorchCheckpointIO, AsyncCheckpointIO)):
            trainer.strategy.checkpoint_io = StraightIO()
        with path_in_errors(path):
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                replace_durably(temporary, path)
    finally:
        trainer.strategy.checkpoint_io = theirs
        if trainer.is_global_zero:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    trainer.strategy.barrier()


def check_checkpoint(path: Path, remedy: str) -> None:
    """Make sure that what :func:`save_checkpoint` wrote is whole, by the checksums in it, which torch does not look at.

    Raises:
        ValueError: If the file is truncated or altered; it names ``path`` and says what to do, ``remedy``.
    """
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
        torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file zip, pickle and torch say whatever they stumble over
        part = f"{type(error).__name__}: {error}".partition("\n")[0]
    if part is not None:
        raise ValueError(f"{path} is damaged ({part}): {remedy}")


@final
class StraightIO(CheckpointIO):
    """Writes a checkpoint straight to its file, and is done when it returns.

    Lightning's own holds it in memory twice and brings it through the system's folder for temporary files, which may be
    smaller than the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, on the rank that is asked to."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None  # torch's writer hides what the file said

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it onto the CPU, or where ``map_location`` says."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


def restore_ended(path: Path, module: LightningModule, callbacks: Sequence[Callback]) -> None:
    """Put module and callbacks where the training that wrote ``path`` at its end left them."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    module.on_load_checkpoint(checkpoint)
    load_whole(module, checkpoint["state_dict"])
    for callback in callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


class CPUThreads(Callback):
    """Gives torch a number of CPU threads while a Trainer is at work.

    A network of a few thousand weights is trained fastest by one: threads that wait for each other at every small
    product cost more than they save, and many times more on a machine that has other things to do.

    Args:
        count: One or more.

    Raises:
        ValueError: If it is less.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}: give torch at least one thread")
        self.count = count
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember how many there were."""
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back as many."""
        torch.set_num_threads(self._before or self.count)


class Continuation(Callback):
    """Stores in every checkpoint what Lightning leaves out, and restores it: each rank's random state, and the steps
    of plateau schedulers, which Lightning takes after the epoch's checkpoint is written and not at all in an epoch that
    was resumed in its middle.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._owed: list[float | None] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state of all ranks. Called on every rank."""
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        checkpoint["continuation"] = {"random": states, "plateau": _plateau_steps(trainer) if ended else []}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the stored state until training starts."""
        self._loaded = checkpoint.get("continuation")

    def forget(self) -> None:
        """Restore nothing of a checkpoint: training goes on from another place than that of the checkpoint."""
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore; in the middle of an epoch this is the last hook before a batch is fetched."""
        _end_epoch(trainer)
        if self._loaded is not None:
            self._restore(trainer)
            self._owed = self._loaded["plateau"]
            self._settle(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore again at the start of an epoch: the module's own start hook may have drawn numbers."""
        self._settle(trainer)
        self._restore(trainer)
        self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Nothing is left to restore once a batch has been fetched."""
        self._loaded = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the plateau steps that Lightning will skip."""
        if trainer.fit_loop.restarting:
            self._owed = _plateau_steps(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._loaded is not None and len(self._loaded["random"]) == trainer.world_size:
            set_random_state(self._loaded["random"][trainer.global_rank])

    def _settle(self, trainer: Trainer) -> None:
        for config, value in zip(trainer.lr_scheduler_configs, self._owed):
            if value is not None:
                config.scheduler.step(value)  # type: ignore[call-arg]
        self._owed = []


def _end_epoch(trainer: Trainer) -> None:
    """Count the epoch that a checkpoint was taken at the end of as done.

    With ``max_steps`` Lightning 2.6 takes it for an unfinished one and counts it twice, so that the data of the next
    epoch are those of the one after it (`FitLoop.restarting`: ``and`` binds closer than ``or``).
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined] - the loop's own setter is the one at fault
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        loop.epoch_progress.increment_completed()


def _plateau_steps(trainer: Trainer) -> list[float | None]:
    """For each scheduler the metric that its plateau step after this epoch looks at, or None."""
    steps: list[float | None] = []
    for config in trainer.lr_scheduler_configs:
        due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(config.monitor or "") if config.reduce_on_plateau else None
        steps.append(float(value) if due and value is not None else None)
    return steps


class History(Callback):
    """One row of metrics an epoch, kept across checkpoints: ``{"epoch", "step", "train/loss", "val/...", ...}``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that this epoch has validation metrics of its own."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row and tell the progress bar."""
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        for name, value in trainer.callback_metrics.items():
            if isinstance(value, Tensor) and (self._validated or not name.startswith("val")):
                row[name] = float(value)
        self._validated = False
        self.rows.append(row)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows up to the checkpoint."""
        self.rows = list(state_dict["rows"])


class Resumable(Checkpoint):
    """Keeps the newest checkpoint at one path, replaced atomically every so often, and one more when training ends.

    Args:
        path: The file.
        ended: The file of the end. Whoever stopped training, a budget or an early stop: it is not to go on from there.
        every: Epochs, or optimizer steps for epochs that are long.
    """

    def __init__(self, path: Path, ended: Path, every: Duration) -> None:
        self.path, self.ended, self.every = path, ended, every
        self._last = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch, where asked for in steps."""
        step = trainer.global_step
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every.unit == "it" and step != self._last and step % self.every.value == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        if self.every.unit == "it" or (trainer.current_epoch + 1) % self.every.value == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what training came to."""
        save_checkpoint(trainer, self.ended)

    def _save(self, trainer: Trainer) -> None:
        self._last = trainer.global_step
        save_checkpoint(trainer, self.path)


class ShowProgress(Callback):
    """Moves the recipe's bar for the stage one step a batch.

    Args:
        part: Which of ``parts`` equally long trainings this is, from 0.
        parts: How many the stage has, e.g. the levels of a hunt.
        label: What this part is.
    """

    def __init__(self, part: int = 0, parts: int = 1, label: str = "") -> None:
        self.part, self.parts, self.label = part, parts, label
        self._shown = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the batches done of all parts, at most ten times a second."""
        if time.monotonic() - self._shown < 0.1 or not trainer.is_global_zero:
            return
        self._shown = time.monotonic()
        total = trainer.num_training_batches * (trainer.max_epochs or 0)
        if trainer.max_steps > 0:
            total = trainer.max_steps * trainer.accumulate_grad_batches
        if 0 < total < float("inf"):
            done = self.part * total + trainer.fit_loop.epoch_loop.total_batch_idx + 1
            progress.update(int(done), int(total * self.parts), self.label)
