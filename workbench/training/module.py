"""TaskModule, a network and a task as a LightningModule, and the base of all supervised modules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerTypeUnion, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.distributed.ranks import all_gather
from workbench.distributed.sharding import shard
from workbench.tasks import Imitation, LogitsSpec, Task, loss_weight, scored, update_metrics
from workbench.training.means import GlobalMean, Means

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRSchedulerTypeUnion]


def make_optimizers(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
) -> Any:
    """The value of ``configure_optimizers``: AdamW at 1e-3 by default, the scheduler stepped once an epoch."""
    built = torch.optim.AdamW(parameters, lr=1e-3) if optimizer is None else optimizer(parameters)
    if lr_scheduler is None:
        return built
    scheduler = lr_scheduler(built)
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    return [built], [scheduler]


@final
class RandomStates:
    """A random state for each network of a family, so that its dropout does not depend on the other networks.

    All start from the state of torch's generators at their first use.

    Attributes:
        states: Name -> states of the CPU generator and, on CUDA, of the device's.
    """

    def __init__(self) -> None:
        self.states: dict[str, list[Tensor]] = {}

    @contextmanager
    def fork(self, member: str, device: torch.device) -> Iterator[None]:
        """Inside, torch draws from the random state of ``member``; afterwards its generators are restored."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if (state := self.states.get(member)) is not None:
                torch.set_rng_state(state[0])
                for index, where in enumerate(devices, 1):
                    torch.cuda.set_rng_state(state[index], where)
            yield
            self.states[member] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(where) for where in devices)]


class StepOutput(NamedTuple):
    """Loss of a training batch, and values to log.

    Args:
        loss: A scalar to minimise, a mean over ``positions``.
        logged: Name -> scalar, means over as many.
        positions: Number of valid positions in the batch, or the sum of their weights, a scalar.
    """

    loss: Tensor
    logged: Mapping[str, Tensor]
    positions: Tensor


class SupervisedModule(LightningModule, ABC):
    """A network trained on a task, or a family of networks trained side by side; subclasses define the loss.

    Logs ``train/*`` at the end of every epoch, and ``val/*`` and ``test/*``: means over all valid positions of the
    split and of all ranks; for a family ``train/NAME/*`` and so on. An epoch that was resumed in its middle counts as a
    whole. The gradient of an update is a mean over all valid positions, however they are distributed over
    micro-batches and ranks.

    Args:
        network: The network that is trained and shipped, or several by name.
        task: Loss and metrics.
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.
        target: Arguments of a network -> targets of a task without labels.
        logits: Where the logits are in what a network returns, see :func:`workbench.tasks.select_logits`: a key, an
            index or a function; None for a tensor, or an output with ``logits``.

    Raises:
        ValueError: If a family is empty or a name is no identifier or an attribute of ``nn.ModuleDict``.
    """

    network: nn.Module
    task: Task

    def __init__(
        self,
        network: nn.Module | Mapping[str, nn.Module],
        task: Task,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        target: Callable[..., Tensor] | None = None,
        logits: LogitsSpec | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            invalid = [repr(name) for name in network if not name.isidentifier() or hasattr(nn.ModuleDict, name)]
            if invalid or not network:
                raise ValueError(
                    f"a family of {', '.join(invalid) or 'nothing'}: give one network or more, named by identifiers "
                    "that are no attributes of torch.nn.ModuleDict"
                )
            self.family = tuple(network)
            network = nn.ModuleDict(network)
        else:
            self.family = ()
        # from_pretrained returns eval mode, and Lightning does not call train().
        self.network = network.train()
        self.task = task
        self.metrics = nn.ModuleDict(
            {
                metric_name(split, member): task.metrics(f"{metric_name(split, member)}/")
                for split in ("val", "test")
                for member in self.members
            }
        )
        self.means = {split: Means() for split in ("train", "val", "test")}
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.target = target
        self.logits = logits
        self._epoch, self._logged = 0, False
        self._global_mean = GlobalMean()
        self.random_states = RandomStates()

    @property
    def members(self) -> dict[str, nn.Module]:
        """The networks of the family by name; the one network by the empty name."""
        return {name: self.network.get_submodule(name) for name in self.family} or {"": self.network}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output; of a family a mapping of them."""
        outputs = {name: network(*args, **kwargs) for name, network in self.members.items()}
        return outputs if self.family else outputs[""]

    @abstractmethod
    def step(self, batch: Any) -> StepOutput:
        """The forward pass of a training batch and its loss."""

    def attach(self, loader: Any) -> Any:
        """The training loader adapted to this module. Jobs call this; with your own Trainer, call it yourself."""
        return loader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        if self._epoch != self.current_epoch:
            # Lightning skips on_train_epoch_start after resuming from the last batch of the previous epoch.
            self._start(self.current_epoch)
        step = self.step(batch)
        self.means["train"].add(step.logged, step.positions)
        return self.scale_loss(step.loss, step.positions)

    def scale_loss(self, loss: Tensor, positions: Tensor) -> Tensor:
        """A micro-batch's mean over ``positions`` times its share of the update; unchanged if it is the only one."""
        return loss if self._trainer is None else self._global_mean.scale_loss(loss, positions, self.trainer)

    def on_train_start(self) -> None:
        """Discard the micro-batches of an interrupted update."""
        self._global_mean = GlobalMean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient the mean over all positions of the update."""
        self._global_mean.scale_gradients(self.parameters(), self.trainer)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's means."""
        self._start(self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's means after its last batch: callbacks' ``on_train_epoch_end`` comes before the module's."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            self._log_epoch()

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that was interrupted, or resumed after its last batch."""
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
        if self.family:
            checkpoint["random_states"] = all_gather(self.random_states.states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the checkpoint's sums."""
        if (stored := checkpoint.get("train_means")) is not None and self._trainer is not None:
            self._epoch, self._logged = stored["epoch"], False
            self.means["train"].restore(stored["ranks"], self.trainer.global_rank, self.trainer.world_size)
            ranks = checkpoint.get("random_states", [])
            self.random_states.states = ranks[self.trainer.global_rank] if len(ranks) == self.trainer.world_size else {}

    def configure_model(self) -> None:
        """Shard the network over the ranks, once, if the Trainer's strategy is ModelParallelStrategy (FSDP2).

        Raises:
            ValueError: If parameters outside the network are trained, whose gradients would not be averaged.
        """
        outside = [
            name for name, each in self.named_parameters() if each.requires_grad and not name.startswith("network.")
        ]
        if outside and self.device_mesh is not None:
            raise ValueError(
                f"{outside[0]!r} is trained outside the network, and ModelParallelStrategy averages only gradients of "
                "what it divides: train with strategy: ddp"
            )
        for network in self.members.values():
            shard(network, self.device_mesh)

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and its scheduler."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizers = make_optimizers(parameters, self.optimizer, self.lr_scheduler)
        if self.family and isinstance(optimizers, dict):
            raise ValueError(
                "the students of a family share one learning rate, and ReduceLROnPlateau would follow one metric: "
                "use a scheduler that needs no metric, or a stage for each student"
            )
        return optimizers

    def _start(self, epoch: int) -> None:
        self._epoch, self._logged = epoch, False
        self.means["train"].reset()

    def _log_epoch(self) -> None:
        if not self._logged:
            self.means["train"].log(self, "train/")
        self._logged = True

    def _evaluate(self, split: str, batch: Any) -> None:
        args, kwargs = self.task.inputs(batch)
        if self.target is not None and isinstance(self.task, Imitation):
            batch = self.task.with_target(batch, self.target(*args, **kwargs))
        losses: dict[str, Tensor] = {}
        for member, network in self.members.items():
            output = scored(self.task, network(*args, **kwargs), batch, self.logits)
            loss = losses[metric_name(member, "loss")] = self.task.loss(output, batch)
            metrics: Any = self.metrics[metric_name(split, member)]
            update_metrics(metrics, output, self.task.targets(batch), loss)
        self.means[split].add(losses, loss_weight(self.task, batch))

    def _log(self, split: str) -> None:
        self.means[split].log(self, f"{split}/")
        for member in self.members:
            self.log_dict(self.metrics[metric_name(split, member)])  # type: ignore[arg-type] - Lightning computes and resets them


@final
class TaskModule(SupervisedModule):
    """A network trained on the task's own labels: the dense baseline, the teacher.

    Example:
        >>> from workbench import TaskModule
        >>> from workbench.models import MLP
        >>> from workbench.tasks import Classification
        >>> module = TaskModule(MLP(64, [100, 100], 10), Classification(10))
    """

    def step(self, batch: Any) -> StepOutput:
        """The task's loss."""
        args, kwargs = self.task.inputs(batch)
        loss = self.task.loss(scored(self.task, self.network(*args, **kwargs), batch, self.logits), batch)
        return StepOutput(loss, {"loss": loss}, loss_weight(self.task, batch))


def metric_name(*parts: str) -> str:
    """The parts that are not empty, joined by slashes: ``val/small/accuracy``."""
    return "/".join(part for part in parts if part)


def network_of(module: nn.Module) -> nn.Module:
    """The part of ``module`` that is shipped and pruned: its ``network`` if it has one, else the module."""
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
        return make_optimizers(self.parameters(), optimizer, lr_scheduler)

    module.configure_optimizers = MethodType(configure_optimizers, module)
    return module
