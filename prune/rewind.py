"""Rewind points: everything that training had after k optimizer updates, kept to return to."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from workbench.continuation import save_checkpoint
from workbench.duration import Duration


class RewindPoint(Checkpoint):
    """Writes Lightning's checkpoint at one moment of training: the point that every later level starts from.

    The file holds weights, buffers, optimizer, schedulers, loop counters, callbacks and, through
    :class:`workbench.continuation.Continuation`, the random state; the data order follows from seed and epoch. "After
    k steps" means after k optimizer updates, whatever the gradient accumulation. A point at the end of an epoch is
    taken after its validation. A ``Checkpoint``, so that other callbacks have seen the end of the epoch before it.

    Args:
        at: When; ``0it`` is before the first update.
        path: The file.

    Raises:
        ValueError: When training starts, if it ends before the point.

    Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
    arXiv:1912.05671; Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning", 2020, arXiv:2003.02389.
    """

    def __init__(self, at: Duration, path: Path) -> None:
        self.at, self.path = at, path
        self._reached = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the point will be reached; take it here if it is before the first update."""
        end = trainer.estimated_stepping_batches
        per_epoch = steps_per_epoch(trainer)
        if pl_module.automatic_optimization and self.at.steps(per_epoch) >= end:
            raise ValueError(
                f"rewind is {self.at}, {self.at.steps(per_epoch)} steps, but a level trains for {end} steps only: "
                "rewind to an earlier point"
            )
        self._reached = trainer.global_step > 0 and self.path.is_file()
        if self.at.value == 0 and trainer.global_step == 0:
            self._take(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a point that lies inside an epoch."""
        if self._due(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._take(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a point that lies at the end of an epoch."""
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        ended = whole and self.at.unit == "ep" and trainer.current_epoch + 1 == self.at.value and not self._reached
        if ended or self._due(trainer):
            self._take(trainer)

    def _due(self, trainer: Trainer) -> bool:
        return self.at.unit == "it" and trainer.global_step == self.at.value and not self._reached

    def _take(self, trainer: Trainer) -> None:
        self._reached = True
        save_checkpoint(trainer, self.path)


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer updates in an epoch; 0 if nobody knows before it ends."""
    batches = trainer.num_training_batches
    return 0 if batches == float("inf") else math.ceil(batches / trainer.accumulate_grad_batches)
