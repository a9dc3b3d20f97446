"""Callbacks that do not change a training's result: CPU threads, the history of metrics, the progress bar."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from workbench import progress


class CPUThreads(Callback):
    """Sets torch's number of CPU threads while a Trainer runs.

    One thread trains a network of a few thousand weights fastest: synchronising threads at every small product costs
    more than it saves, and many times more on a busy machine.

    Args:
        count: Number of threads, at least 1.

    Raises:
        ValueError: If it is less.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}: give torch at least one thread")
        self.count = count
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the number of threads."""
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous number."""
        torch.set_num_threads(self._before or self.count)


class History(Callback):
    """One row of metrics an epoch, kept across checkpoints: ``{"epoch", "step", "train/loss", "val/...", ...}``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch has validation metrics."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row."""
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
