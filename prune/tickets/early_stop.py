"""When a training of a hunt ends before its budget does, and how soon it was at its best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from prune.masks.memory import local, shard
from workbench.distributed.ranks import full_tensor
from workbench.duration import Duration


def best_of(history: Sequence[Mapping[str, float]], after: int = 0) -> dict[str, float] | None:
    """The first step with the lowest validation loss: how soon a network learns.

    Args:
        history: A row an epoch, as :class:`workbench.training.callbacks.History` keeps them.
        after: Only rows of later steps count: those of this training, where others came before.

    Returns:
        ``{"step", "score"}``, or None without a validation loss.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv:1803.03635, section 2: "the iteration of
    minimum validation loss".
    """
    rows = [(row.get("val/loss", math.nan), row["step"]) for row in history if row["step"] > after]
    score, step = min(((loss, step) for loss, step in rows if math.isfinite(loss)), default=(None, None))
    return None if score is None or step is None else {"step": step, "score": score}


@final
class EarlyStop(Checkpoint):
    """Ends a training after so many validations without a better score, and restores its best weights.

    They are the weights and buffers that were validated best, also if something else ended training; of equally good
    ones the earliest. A ``Checkpoint``, so that it runs after other callbacks' validation hooks, and before the
    callback that saves the end of training. Its state is part of the trainer's checkpoints. Ranks use the mean of their
    scores.

    Args:
        patience: After how many, 1 or more.
        after: Validations count from here on: those before the rewind point are not a level's own.
        monitor: The validation metric by its name without prefix, and its better direction.

    Attributes:
        ended: ``epoch`` (how many were trained), ``step`` and ``best_step``, None if no score was finite; empty before
            the end.

    Raises:
        ValueError: If ``patience`` is out of range; when training starts, if nothing is validated, or a callback ends
            it with an average of weights; at a validation, if the metric is not there.
    """

    def __init__(self, patience: int, after: Duration, monitor: tuple[str, Literal["min", "max"]]) -> None:
        if patience < 1:
            raise ValueError(f"early_stop is {patience}: give a number of validations, 1 or more")
        self.patience, self.after = patience, after
        self.score, self.sign = f"val/{monitor[0]}", 1 if monitor[1] == "max" else -1
        self.ended: dict[str, int | None] = {}
        self._waited = 0
        self._best: tuple[float, int] | None = None
        self._weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that something is validated; end a training at once that was about to end when it was stopped."""
        if not trainer.enable_validation:
            raise ValueError(
                f"early_stop is {self.patience}, but nothing is validated: give the data module a val_dataloader, the "
                "module a validation_step and limit_val_batches above 0, or train to the end"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if "WeightAveraging" in "".join(cls.__name__ for cls in type(callback).__mro__):
                raise ValueError(
                    f"early_stop keeps the best weights, and {type(callback).__name__} ends with an average: use one"
                )
        self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the validation, if it is one of training."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not self._counts(trainer):
            return
        if self.score not in trainer.callback_metrics:
            raise ValueError(
                f"early_stop goes by {self.score}, which is not logged, only {sorted(trainer.callback_metrics)}: log "
                "it in validation_step"
            )
        value = torch.as_tensor(trainer.callback_metrics[self.score], device=trainer.strategy.root_device)
        score = self.sign * float(trainer.strategy.reduce(value.float(), reduce_op="mean"))
        if math.isfinite(score) and (self._best is None or score > self._best[0]):
            self._best, self._waited = (score, trainer.global_step), 0
            self._weights = {name: full_tensor(t).detach().to("cpu", copy=True) for name, t in _tensors(pl_module)}
        else:
            self._waited += 1
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best weights."""
        step = None if self._best is None else self._best[1]
        self.ended = {"epoch": trainer.current_epoch, "step": trainer.global_step, "best_step": step}
        for name, tensor in _tensors(pl_module) if self._weights else ():
            local(tensor).copy_(shard(self._weights[name], tensor))
        self._weights = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where a training was resumed at its very end: Lightning calls no ``on_train_end`` then."""
        if not self.ended:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How long it has waited, for what, and the best weights."""
        return {"waited": self._waited, "best": self._best, "weights": self._weights, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._waited, self._best = state_dict["waited"], state_dict["best"]
        self._weights, self.ended = state_dict["weights"], state_dict["ended"]

    def _counts(self, trainer: Trainer) -> bool:
        done = trainer.global_step if self.after.unit == "it" else trainer.current_epoch + 1
        return done > self.after.value

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = trainer.should_stop or self._waited >= self.patience


def _tensors(module: LightningModule) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
