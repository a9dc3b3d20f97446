"""Small trainings on a task."""

from typing import Any

import lightning.pytorch as lp
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.trainers import QUIET
from workbench.tasks import Task
from workbench.training.module import SupervisedModule, TaskModule


def trained(task: Task, network: nn.Module, x: torch.Tensor, y: torch.Tensor, **trainer: Any) -> dict[str, float]:
    """What one epoch on (x, y), in two batches of unlike sizes, logs in training and validation."""
    return fitted(TaskModule(network, task, lambda parameters: torch.optim.SGD(parameters, lr=0.1)), x, y, **trainer)


def fitted(module: SupervisedModule, x: torch.Tensor, y: torch.Tensor, **trainer: Any) -> dict[str, float]:
    """What one epoch of a module logs."""
    loader: Any = DataLoader(TensorDataset(x, y), batch_size=len(x) - len(x) // 3)
    own = lp.Trainer(**{**QUIET, "max_epochs": 1, **trainer})
    own.fit(module, loader, loader)
    return {name: float(value) for name, value in own.callback_metrics.items()}
