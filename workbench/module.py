"""TaskModule: a network and a task as a LightningModule; what every supervised module here shares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, final

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


@final
class Means:
    """Weighted means of named numbers over many batches, summed in fp64 without waiting for the device.

    Logging every batch through Lightning took a quarter of a small network's step, and forgot what came before a
    checkpoint in the middle of an epoch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Count ``values``, scalars that are means over ``weight`` positions, a scalar."""
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        weight = weight.to(dtype)
        for name, value in values.items():
            row = torch.stack((value.detach().to(dtype) * weight, weight))
            # Not in place: validation makes tensors in inference mode, which may not be updated outside of it.
            self._sums[name] = self._sums[name] + row if name in self._sums else row

    def log(self, module: Any, prefix: str = "") -> None:
        """Log the means over all batches of all ranks, from a hook of ``module`` or of a callback."""
        for name, (total, weight) in self.local().items():
            mean = total / weight if weight else 0.0
            # The weight stays a float: Lightning 2.6 averages integer ones over ranks and rounds down.
            module.log(f"{prefix}{name}", mean, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def reset(self) -> None:
        """Start anew."""
        self._sums = {}

    def local(self) -> dict[str, list[float]]:
        """This rank's [sum of value * weight, sum of weight] by name."""
        return {name: row.tolist() for name, row in self._sums.items()}

    def state(self) -> list[dict[str, list[float]]]:
        """What every rank has, for a checkpoint. Called on every rank."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [self.local()]
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, self.local())
        return states

    def restore(self, states: Sequence[Mapping[str, Sequence[float]]], rank: int, world: int) -> None:
        """Go on from a checkpoint's ``state``; with another number of ranks, rank 0 takes it all."""
        mine = [states[rank]] if len(states) == world else states if rank == 0 else []
        self.reset()
        for state in mine:
            for name, row in state.items():
                before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
                self._sums[name] = before + torch.tensor(row, dtype=torch.float64)


class SupervisedModule(LightningModule, ABC):
    """A network trained on a task; subclasses say only what its loss is made of.

    Logs ``train/*`` at the end of every epoch, and ``val/*`` and ``test/*``: means over all valid positions of the
    split and of all ranks. An epoch that was resumed in its middle counts as a whole.

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
        self.means = {split: Means() for split in ("train", "val", "test")}
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._epoch, self._logged = 0, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output."""
        return self.network(*args, **kwargs)

    @abstractmethod
    def terms(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        """The training loss for ``output`` as ``"loss"``, a scalar, and the terms worth logging beside it.

        Each is a mean over the valid positions of the batch.
        """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        if self._epoch != self.current_epoch:
            # Lightning skips on_train_epoch_start after resuming from the last batch of the epoch before.
            self._start(self.current_epoch)
        terms = self.terms(self._output(batch), batch)
        self.means["train"].add(terms, self.task.valid(batch).sum())
        return terms["loss"]

    def on_train_epoch_start(self) -> None:
        """Start the epoch's means."""
        self._start(self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's means after its last batch: callbacks' ``on_train_epoch_end`` comes before the module's."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            self._log_epoch()

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that was broken off, or resumed after its last batch."""
        self._log_epoch()
        self.means["train"].reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update loss and metrics of the validation split."""
        self._evaluate("val", batch)

    def on_validation_epoch_start(self) -> None:
        """Start the split's means."""
        self.means["val"].reset()

    def on_validation_epoch_end(self) -> None:
        """Log loss and metrics of the validation split."""
        self._log("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update loss and metrics of the test split."""
        self._evaluate("test", batch)

    def on_test_epoch_start(self) -> None:
        """Start the split's means."""
        self.means["test"].reset()

    def on_test_epoch_end(self) -> None:
        """Log loss and metrics of the test split."""
        self._log("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's sums so far."""
        checkpoint["train_means"] = {"epoch": self._epoch, "ranks": self.means["train"].state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's sums."""
        if (stored := checkpoint.get("train_means")) is not None and self._trainer is not None:
            self._epoch, self._logged = stored["epoch"], False
            self.means["train"].restore(stored["ranks"], self.trainer.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> Any:
        """The optimizer over the network's trainable parameters, and its scheduler."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return configured(parameters, self.optimizer, self.lr_scheduler)

    def _output(self, batch: Any) -> Tensor:
        args, kwargs = self.task.inputs(batch)
        return self.task.output(self.network(*args, **kwargs))

    def _start(self, epoch: int) -> None:
        self._epoch, self._logged = epoch, False
        self.means["train"].reset()

    def _log_epoch(self) -> None:
        if not self._logged:
            self.means["train"].log(self, "train/")
        self._logged = True

    def _evaluate(self, split: str, batch: Any) -> None:
        output = self._output(batch)
        metrics: Any = self.metrics[split]
        metrics.update(output, self.task.targets(batch))
        self.means[split].add({"loss": self.task.loss(output, batch)}, self.task.valid(batch).sum())

    def _log(self, split: str) -> None:
        self.means[split].log(self, f"{split}/")
        self.log_dict(self.metrics[split])  # type: ignore[arg-type] - Lightning computes and resets them


@final
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
