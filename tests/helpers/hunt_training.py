"""A small Lightning training for hunts, and a callback that records each update."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.tickets.arms import Hunt
from prune.tickets.controls import Controls
from prune.tickets.lightning import LightningTrainee
from prune.tickets.search import search
from prune.tickets.store import Store
from prune.tickets.subject import Subject
from tests.helpers.trainers import Stop
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.tasks import Classification
from workbench.training.fit import module_for

SGD = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=1e-3)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
BATCHES = 6


class Net(nn.Module):
    """Batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Blobs(lp.LightningDataModule):
    """Three noisy classes."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(3)
        labels = torch.arange(48) % 3
        inputs = torch.randn(48, 5, generator=noise) + nn.functional.one_hot(labels, 5)
        self.held = [TensorDataset(inputs[:36], labels[:36]), TensorDataset(inputs[36:], labels[36:])]

    def train_dataloader(self) -> Any:
        return DataLoader(self.held[0], 6, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held[1], 12)


class Watch(lp.Callback):
    """Learning rates, first inputs and weights of every update, by training; stops after ``left`` of them."""

    def __init__(self, left: int = -1) -> None:
        self.left, self.rates, self.seen, self.weights = left, [], [], []  # type: ignore[var-annotated]

    def __deepcopy__(self, memo: Any) -> "Watch":
        return self

    def on_train_start(self, trainer: lp.Trainer, pl_module: Any) -> None:
        for each in (self.rates, self.seen, self.weights):
            each.append([])

    def on_train_batch_start(self, trainer: lp.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen[-1].append(batch[0])
        state = {name: value.clone() for name, value in pl_module.network.state_dict().items()}
        momenta = [len(optimizer.state) for optimizer in trainer.optimizers]
        self.weights[-1].append((trainer.global_step, state, momenta))

    def on_before_optimizer_step(self, trainer: lp.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates[-1].append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def module(optimizer: Any = SGD, scheduler: Any = None, net: Callable[[], nn.Module] = Net) -> lp.LightningModule:
    """A seeded module."""
    torch.manual_seed(1)
    task_module = module_for(net(), Blobs(), task=Classification(3), optimizer=optimizer)
    if scheduler is not None:
        interval, make = scheduler

        def configure_optimizers() -> Any:
            built = optimizer(task_module.parameters())
            config = {"scheduler": make(built), "interval": interval, "monitor": "val/loss"}
            return {"optimizer": built, "lr_scheduler": config}

        task_module.configure_optimizers = configure_optimizers
    return task_module


def trainee(out: Path, of: lp.LightningModule | None = None, rewind: str = "8it", **options: Any) -> LightningTrainee:
    """A trainee of three epochs, each of ``BATCHES`` updates."""
    given = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
        **options.pop("trainer", {}),
    }
    checkpoint = Duration.parse(options.pop("checkpoint", "1ep"))
    early_stop, data = options.pop("early_stop", None), options.pop("data", None) or Blobs()
    of = module(**options) if of is None else of
    subject = Subject(of, data, given, 1)
    return LightningTrainee(subject, Duration.parse(rewind), out / "checkpoints", checkpoint, 2, early_stop)


def run_hunt(
    out: Path,
    of: LightningTrainee,
    densities: Iterable[float] = (1.0, 0.6, 0.3),
    mode: Any = "all",
    order: Any = "same",
    controls: Iterable[Any] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Search with a trainee; the records of the levels."""
    return search(
        Hunt(
            of,
            Pruner(seed=1),
            tuple(densities),
            Store(out, "key"),
            Rewind(mode=mode, order=order),
            Controls(tuple(controls)),
            **options,
        )
    )


def weights(out: Path, level: int) -> dict[str, Tensor]:
    """The weights at the end of a level."""
    return compact.tensors(out / f"level_{level:02d}")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
