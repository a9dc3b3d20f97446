"""Small Lightning trainings that know nothing of pruning, in either Lightning namespace."""

import functools
from typing import Any

import lightning.pytorch as lp
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prune import Masks, Pruner
from tests.helpers.trainers import QUIET

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
TOTAL = 6 * 10 + 10 * 3  # prunable weights of `net`


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Linear(10, 3))


def data(batches: int = 8) -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(4 * batches, 6), torch.randint(0, 3, (4 * batches,))), 4)


def user_module(namespace: Any = lp, optimizer: Any = SGD) -> Any:
    class UserModule(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    return UserModule()


def two_optimizers(namespace: Any = lp, clip: float | None = None, network: nn.Module | None = None) -> Any:
    """Manual optimization with two optimizers; the first holds the masked network, `net()` by default."""

    class TwoOptimizers(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.network, self.critic = net() if network is None else network, nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.network(batch[0])).square().mean())
                if clip:
                    self.clip_gradients(optimizer, clip, gradient_clip_algorithm="norm")
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [SGD(self.network.parameters()), ADAMW(self.critic.parameters())], []

    return TwoOptimizers()


def fit(
    module: Any, *callbacks: Any, namespace: Any = lp, ckpt_path: Any = None, batches: int = 8, **options: Any
) -> Any:
    keeping = any(isinstance(c, lp.callbacks.Checkpoint | pl.callbacks.Checkpoint) for c in callbacks)
    options = {"max_epochs": 4, **QUIET, "enable_checkpointing": keeping, **options}
    trainer = namespace.Trainer(**options, callbacks=list(callbacks))
    trainer.fit(module, data(batches), ckpt_path=ckpt_path)
    return trainer


def alive(module: Any) -> int:
    """Prunable weights that are not zero."""
    return sum(int(module.network[i].weight.count_nonzero()) for i in (0, 3))


class Watch(lp.Callback, pl.Callback):  # type: ignore[misc]
    """Weights alive after every batch, the masks of ``of`` as they change, and the density logged after every epoch."""

    def __init__(self, of: Any = None) -> None:
        self.of, self.alive, self.masks, self.epochs = of, [], [], []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.alive.append(alive(pl_module))
        if self.of is not None and self.of.masks is not None and self.of.masks not in self.masks:
            self.masks.append(self.of.masks)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if "density" in trainer.callback_metrics:
            self.epochs.append(float(trainer.callback_metrics["density"]))


def masks(density: float = 0.3) -> Masks:
    return Pruner()(net(), density)
