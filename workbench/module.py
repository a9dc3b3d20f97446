"""TaskModule: a network and a task as a LightningModule; what every supervised module here shares."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerTypeUnion, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.tasks import Task

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRSchedulerTypeUnion]


def configured(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
) -> Any:
    """What ``configure_optimizers`` returns: AdamW at 1e-3 unless told otherwise, scheduler stepped per epoch."""
    made = torch.optim.AdamW(parameters, lr=1e-3) if optimizer is None else optimizer(parameters)
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    return [made], [scheduler]


class SupervisedModule(LightningModule):
    """A network trained on a task; subclasses say only what its loss is made of.

    Logs ``train/*`` per epoch and ``val/*``, ``test/*`` as means over the whole split, across ranks.

    Args:
        network: The network that is trained and shipped.
        task: Loss and metrics.
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.
    """

    network: nn.Module
    task: Task

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # A transformers model comes from from_pretrained in eval mode, and nobody else wakes it up.
        self.network = network.train()
        self.task = task
        self.metrics = nn.ModuleDict({split: task.metrics(f"{split}/") for split in ("val", "test")})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output."""
        return self.network(*args, **kwargs)

    @abstractmethod
    def terms(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        """The training loss for ``output`` as ``"loss"``, a scalar, and the terms worth logging beside it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        terms = self.terms(self._output(batch), batch)
        size = len(self.task.targets(batch))
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return terms["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update loss and metrics of the validation split."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update loss and metrics of the test split."""
        self._evaluate("test", batch)

    def configure_optimizers(self) -> Any:
        """The optimizer over the network's trainable parameters, and its scheduler."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return configured(parameters, self.optimizer, self.lr_scheduler)

    def _output(self, batch: Any) -> Tensor:
        args, kwargs = self.task.inputs(batch)
        return self.task.output(self.network(*args, **kwargs))

    def _evaluate(self, split: str, batch: Any) -> None:
        output = self._output(batch)
        metrics: Any = self.metrics[split]
        metrics.update(output, self.task.targets(batch))
        size = len(self.task.targets(batch))
        self.log(f"{split}/loss", self.task.loss(output, batch), batch_size=size, sync_dist=True)
        self.log_dict(metrics, batch_size=size)


class TaskModule(SupervisedModule):
    """A network trained on the task's own labels: the dense baseline, the teacher.

    Example:
        >>> from workbench import TaskModule
        >>> from workbench.models import MLP
        >>> from workbench.tasks import Classification
        >>> module = TaskModule(MLP(64, [100, 100], 10), Classification(10))
    """

    def terms(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        """The task's loss."""
        return {"loss": self.task.loss(output, batch)}


def network_of(module: nn.Module) -> nn.Module:
    """What of ``module`` is shipped and pruned: its ``network`` if it has one, else all of it."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def with_optimizer(
    module: LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
) -> LightningModule:
    """Let ``optimizer`` and ``lr_scheduler`` replace the module's own ``configure_optimizers``, as LightningCLI does.

    Raises:
        ValueError: If a scheduler is given without an optimizer.
    """
    if optimizer is None and lr_scheduler is None:
        return module
    if optimizer is None:
        raise ValueError("lr_scheduler is given without optimizer: give both, or neither to keep the module's own")

    def configure_optimizers(self: LightningModule) -> Any:
        return configured(self.parameters(), optimizer, lr_scheduler)

    module.configure_optimizers = MethodType(configure_optimizers, module)
    return module
