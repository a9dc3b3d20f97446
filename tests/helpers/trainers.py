"""Options of quiet Lightning Trainers, and callbacks that stop a training as a power failure does."""

from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
BOTH = pytest.mark.parametrize("namespace", [lp, pl], ids=["lightning.pytorch", "pytorch_lightning"])


class Stop(RuntimeError):
    """Power failure."""


class StopAt(lp.Callback):
    """Fails after a number of batches of the whole training."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: lp.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            raise Stop


class StopAfter(lp.Callback):
    """Fails once ``StopAfter.left`` more batches are done, counted over all trainings and copies; 0 for never."""

    left = 0

    def on_train_batch_end(self, *_: Any) -> None:
        StopAfter.left -= 1
        if StopAfter.left == 0:
            raise Stop
