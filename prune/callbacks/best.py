"""What compares networks by a metric in a Lightning Trainer: only those at the final density count.

A network that is not at its density yet scores better than what it becomes. So whenever one is pruned, the scores of
checkpoints saved before turn into the worst there is: any later one takes their place among the best, and their file's
place on disk, while they stay to resume from until then. Early stopping starts to count again, and until the final
density is reached it counts nothing, unless what it ends is a level.

The scores are attributes that callbacks have in their own checkpoints, so a resumed training knows them; only
``stopping_threshold`` is taken away for a while, and given back.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks import EarlyStopping as OtherEarlyStopping
from pytorch_lightning.callbacks import ModelCheckpoint as OtherModelCheckpoint
from torch import Tensor


def checkpointers(trainer: Any) -> list[Any]:
    """The callbacks that keep the best checkpoints by a metric."""
    kinds = (ModelCheckpoint, OtherModelCheckpoint)
    return [each for each in trainer.callbacks if isinstance(each, kinds) and each.monitor and each.save_top_k]


def stoppers(trainer: Any) -> list[Any]:
    """The callbacks that stop training by a metric."""
    return [each for each in trainer.callbacks if isinstance(each, EarlyStopping | OtherEarlyStopping)]


def names(callbacks: list[Any]) -> str:
    """``ModelCheckpoint(monitor='val/loss') and EarlyStopping(monitor='val/loss')``."""
    return " and ".join(dict.fromkeys(f"{type(each).__name__}(monitor={each.monitor!r})" for each in callbacks))


def forget(trainer: Any) -> None:
    """Let networks up to now count as worse than any that comes."""
    for each in checkpointers(trainer):
        worst = _worst(each.mode == "min")
        each.best_k_models = dict.fromkeys(each.best_k_models, worst)
        if each.best_k_models:
            each.kth_value = worst
        if each.best_model_score is not None:
            each.best_model_score = worst
    for each in stoppers(trainer):
        each.wait_count, each.best_score = 0, _worst(each.monitor_op == torch.lt)


def of_denser(trainer: Any) -> Iterator[tuple[Any, str]]:
    """Callbacks whose best checkpoint is of a network that has been pruned since, with that checkpoint's path."""
    for each in checkpointers(trainer):
        score, worst = each.best_model_score, _worst(each.mode == "min")
        if each.best_model_path and score is not None and bool(torch.as_tensor(score).cpu() == worst):
            yield each, each.best_model_path


@final
class Held:
    """Early stopping that is held back."""

    def __init__(self) -> None:
        self._thresholds: list[tuple[Any, Any]] = []

    def hold(self, trainer: Any) -> None:
        """Count nothing up to here, and stop at no threshold until :meth:`release`."""
        held = {id(each) for each, _ in self._thresholds}
        for each in stoppers(trainer):
            each.wait_count, each.best_score = 0, _worst(each.monitor_op == torch.lt)
            if id(each) not in held:
                self._thresholds.append((each, each.stopping_threshold))
            each.stopping_threshold = None

    def release(self) -> None:
        """Give the thresholds back."""
        while self._thresholds:
            each, threshold = self._thresholds.pop()
            each.stopping_threshold = threshold


def _worst(lower_is_better: bool) -> Tensor:
    return torch.tensor(torch.inf if lower_is_better else -torch.inf)
