"""Rewind points as Lightning checkpoints: written at one update of level 0, and restored in part by later levels."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from prune.masks.stepping import unwrap_optimizer
from prune.rewinding.modes import Groups, groups_of, hold
from prune.rewinding.start import Start
from workbench.duration import Duration
from workbench.models.wrappers import unwrap
from workbench.training.callbacks import History
from workbench.training.module import network_of
from workbench.training.resume import save_checkpoint

_NEVER = 2**62


class RewindPoint(Checkpoint):
    """Writes Lightning's checkpoint after so many updates: the point that every later level starts from.

    The file holds weights, buffers, optimizer, schedulers, loop counters, callbacks and, through
    :class:`workbench.training.resume.ResumeState`, the random state; the data order follows from seed and epoch.
    "After k
    steps" means after k optimizer updates, whatever the gradient accumulation. A point at the end of an epoch is
    taken after its validation. A ``Checkpoint``, so that other callbacks have seen the end of the epoch before it.

    Args:
        at: When; ``0it`` is before the first update.
        path: The file.

    Raises:
        ValueError: When training starts, if it ends before the point, or goes on from after it and the file is missing;
            in training, if it steps over the point inside a batch, as a module with several optimizers may.

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
        done = trainer.current_epoch if self.at.unit == "ep" else trainer.global_step
        if trainer.global_step > 0 and done >= self.at.value and not self._reached:
            raise ValueError(
                f"{self.path} is missing, and training goes on from after that point: move the folder that it goes on "
                "from aside, to train from the start"
            )
        if self.at.value == 0 and trainer.global_step == 0:
            self._take(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a point that lies inside an epoch."""
        if self.at.unit == "it" and trainer.global_step > self.at.value and not self._reached:
            raise ValueError(
                f"rewind is {self.at}, but training went past that step inside a batch, to step {trainer.global_step}: "
                "give a step between two batches, each step of each optimizer counted"
            )
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
    """Optimizer updates in an epoch; 0 if that is unknown before it ends."""
    batches = trainer.num_training_batches
    return 0 if batches == float("inf") else math.ceil(batches / trainer.accumulate_grad_batches)


@final
class LastLearningRate(Callback):
    """Records the learning rate, momentum and so on of each optimizer's last step; or holds them, for fine-tuning.

    What a checkpoint has in the optimizer's groups is not that: after the last step a scheduler has gone on, and a
    cosine is then at zero, where nothing would be trained.

    Args:
        held: Make every step with the recorded values, and stop the schedulers. The checkpoint that training starts
            from must be of a training that recorded them.
    """

    def __init__(self, held: bool = False) -> None:
        self.held, self.budget = held, 0
        self.groups: dict[int, Groups] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record how many updates are planned, if that is known; or set the optimizers and stop the schedulers."""
        if not self.held and pl_module.automatic_optimization:
            steps = trainer.estimated_stepping_batches
            self.budget = steps if math.isfinite(steps) else 0
        for config in trainer.lr_scheduler_configs if self.held else ():
            config.frequency = _NEVER
        for index, groups in self.groups.items() if self.held else ():
            hold(trainer.optimizers[index], groups)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the optimizer's groups; or set them, against any callback that has changed them since."""
        index = next(
            i for i, each in enumerate(trainer.optimizers) if unwrap_optimizer(each) is unwrap_optimizer(optimizer)
        )
        if not self.held:
            self.groups[index] = groups_of(optimizer)
        elif index in self.groups:
            hold(optimizer, self.groups[index])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record. Not as a callback's state, which Lightning would miss where there is no such callback."""
        checkpoint["last_update"] = {"groups": self.groups, "budget": self.budget}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the record."""
        if (last := checkpoint.get("last_update")) is not None:
            self.groups, self.budget = last["groups"], last["budget"]


@final
class PartialRestore(Callback):
    """Restores a level's starting checkpoint only in part, as its :class:`~prune.rewinding.start.Start` says.

    Where weights are not the checkpoint's, running averages of the weights start anew. A training that starts from the
    end of level 0 takes its counters, schedules and history from there, but not the state of its callbacks. A training
    that is resumed from a checkpoint of its own is left alone.

    Args:
        path: The checkpoint that the level starts from.
        start: Which parts of it.
        load: Gives the network its weights.

    Raises:
        ValueError: When training starts, if other weights would go into an average of
            :class:`lightning.pytorch.callbacks.StochasticWeightAveraging` that has begun.
    """

    def __init__(self, path: Path, start: Start, load: Callable[[Mapping[str, Tensor]], None]) -> None:
        self.path, self.start, self.load = path, start, load

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take out what is not to be restored, before callbacks and loops read the checkpoint."""
        if not self._starts_level(trainer):
            return
        if not self.start.random:
            checkpoint["resume"]["random"] = []
        if self.start.at == "end":
            # As at the end of an epoch, for the loop goes on with the next one from there.
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"] - 1
            checkpoint["resume"]["plateau"] = []
            states = checkpoint["callbacks"]
            checkpoint["callbacks"] = {key: states[key] for key in states if key == History.__qualname__}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change what has been restored, before masks are put on it."""
        if not self._starts_level(trainer):
            return
        for optimizer in trainer.optimizers if not self.start.optimizer else ():
            unwrap_optimizer(optimizer).state.clear()
        if self.start.weights is not None:
            self.load(self.start.weights)
            _average_anew(trainer, pl_module)

    def _starts_level(self, trainer: Trainer) -> bool:
        return trainer.ckpt_path is not None and Path(trainer.ckpt_path) == self.path


def _average_anew(trainer: Trainer, module: LightningModule) -> None:
    """Let running averages, of callbacks or of the module, begin with the network as it is now."""
    network = network_of(module)
    for average in _averages(trainer, module):
        average.n_averaged.zero_()  # the next update copies
        twin = network_of(unwrap(average))
        if (state := network.state_dict()).keys() == twin.state_dict().keys():
            twin.load_state_dict(state)


def _averages(trainer: Trainer, module: LightningModule) -> Iterator[AveragedModel]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging) and callback._init_n_averaged:
            raise ValueError(
                "StochasticWeightAveraging has weights in its average that this training does not start from: average "
                "in a fit of its own, rewind to a point before, or rewind all"
            )
    held = itertools.chain.from_iterable(vars(callback).values() for callback in callbacks)
    yield from (each for each in itertools.chain(held, module.modules()) if isinstance(each, AveragedModel))
