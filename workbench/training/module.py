"""TaskModule: a network and a task as a LightningModule; what every supervised module here shares."""

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

from workbench.distributed.ranks import everyone
from workbench.distributed.sharding import divide
from workbench.tasks import Imitation, Task
from workbench.training.means import GlobalMean, Means

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
class Streams:
    """A stream of random numbers for each network of a family, so that one's dropout does not depend on the others'.

    All begin with the state that torch's generators have at their first use.

    Attributes:
        states: By name, that of the CPU and, where there is one, of the device.
    """

    def __init__(self) -> None:
        self.states: dict[str, list[Tensor]] = {}

    @contextmanager
    def of(self, member: str, device: torch.device) -> Iterator[None]:
        """Inside, numbers are drawn from the stream of ``member``; the generators are then as they were."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if (state := self.states.get(member)) is not None:
                torch.set_rng_state(state[0])
                for index, where in enumerate(devices, 1):
                    torch.cuda.set_rng_state(state[index], where)
            yield
            self.states[member] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(where) for where in devices)]


class Step(NamedTuple):
    """What a batch has to say to an update.

    Args:
        loss: A scalar to minimise, a mean over ``positions``.
        logged: Scalars worth logging, means over as many.
        positions: How many of the batch count, a scalar.
    """

    loss: Tensor
    logged: Mapping[str, Tensor]
    positions: Tensor


class SupervisedModule(LightningModule, ABC):
    """A network trained on a task, or a family of them side by side; subclasses say only what its loss is made of.

    Logs ``train/*`` at the end of every epoch, and ``val/*`` and ``test/*``: means over all valid positions of the
    split and of all ranks; for a family ``train/NAME/*`` and so on. An epoch that was resumed in its middle counts as a
    whole. The gradient of an update is a mean over all valid positions, however they are shared out among
    micro-batches and ranks.

    Args:
        network: The network that is trained and shipped, or several by name.
        task: Loss and metrics.
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.
        target: Arguments of a network -> what a task without labels compares its output with.

    Raises:
        ValueError: If a family has no member or one whose name is no name.
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
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            taken = [name for name in network if not name.isidentifier() or hasattr(nn.ModuleDict, name)]
            if odd := taken or ([] if network else ["nothing"]):
                raise ValueError(
                    f"a family of {odd[0]!r}: give one network or more, each by a name of its own, not torch's"
                )
            self.family = tuple(network)
            network = nn.ModuleDict(network)
        else:
            self.family = ()
        # A transformers model comes from from_pretrained in eval mode, and nobody else wakes it up.
        self.network = network.train()
        self.task = task
        self.metrics = nn.ModuleDict(
            {
                named(split, member): task.metrics(f"{named(split, member)}/")
                for split in ("val", "test")
                for member in self.members
            }
        )
        self.means = {split: Means() for split in ("train", "val", "test")}
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.target = target
        self._epoch, self._logged = 0, False
        self._global_mean = GlobalMean()
        self.streams = Streams()

    @property
    def members(self) -> dict[str, nn.Module]:
        """The networks of the family by name; the one network by the empty name."""
        return {name: self.network.get_submodule(name) for name in self.family} or {"": self.network}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output; of a family a mapping of them."""
        outputs = {name: network(*args, **kwargs) for name, network in self.members.items()}
        return outputs if self.family else outputs[""]

    @abstractmethod
    def step(self, batch: Any) -> Step:
        """The forward pass of a training batch and its loss."""

    def attach(self, loader: Any) -> Any:
        """The training loader as this module wants it; recipes call this, with a Trainer of your own you do."""
        return loader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        if self._epoch != self.current_epoch:
            # Lightning skips on_train_epoch_start after resuming from the last batch of the epoch before.
            self._start(self.current_epoch)
        step = self.step(batch)
        self.means["train"].add(step.logged, step.positions)
        return self.weighed(step.loss, step.positions)

    def weighed(self, loss: Tensor, positions: Tensor) -> Tensor:
        """A micro-batch's mean over ``positions`` by its share of the update; as it is where it is all of that."""
        return loss if self._trainer is None else self._global_mean.weigh(loss, positions, self.trainer)

    def on_train_start(self) -> None:
        """Forget the micro-batches of an update that was broken off."""
        self._global_mean = GlobalMean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient the mean over all positions of the update."""
        self._global_mean.settle(self.parameters(), self.trainer)

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
        if self.family:
            checkpoint["streams"] = everyone(self.streams.states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's sums."""
        if (stored := checkpoint.get("train_means")) is not None and self._trainer is not None:
            self._epoch, self._logged = stored["epoch"], False
            self.means["train"].restore(stored["ranks"], self.trainer.global_rank, self.trainer.world_size)
            ranks = checkpoint.get("streams", [])
            self.streams.states = ranks[self.trainer.global_rank] if len(ranks) == self.trainer.world_size else {}

    def configure_model(self) -> None:
        """Divide the network among the ranks, once, if the Trainer's strategy is ModelParallelStrategy (FSDP2).

        Raises:
            ValueError: If something beside the network is trained, whose gradients nobody would average.
        """
        beside = [
            name for name, each in self.named_parameters() if each.requires_grad and not name.startswith("network.")
        ]
        if beside and self.device_mesh is not None:
            raise ValueError(
                f"{beside[0]!r} is trained beside the network, and ModelParallelStrategy averages only gradients of "
                "what it divides: train with strategy: ddp"
            )
        for network in self.members.values():
            divide(network, self.device_mesh)

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and its scheduler."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        made = configured(parameters, self.optimizer, self.lr_scheduler)
        if self.family and isinstance(made, dict):
            raise ValueError(
                "the learning rate of a family is one, and ReduceLROnPlateau would follow one metric for all of them: "
                "use a scheduler of time alone, or a stage for each student"
            )
        return made

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
            output = self.task.output(network(*args, **kwargs))
            metrics: Any = self.metrics[named(split, member)]
            metrics.update(output, self.task.targets(batch))
            losses[named(member, "loss")] = self.task.loss(output, batch)
        self.means[split].add(losses, self.task.valid(batch).sum())

    def _log(self, split: str) -> None:
        self.means[split].log(self, f"{split}/")
        for member in self.members:
            self.log_dict(self.metrics[named(split, member)])  # type: ignore[arg-type] - Lightning computes and resets them


@final
class TaskModule(SupervisedModule):
    """A network trained on the task's own labels: the dense baseline, the teacher.

    Example:
        >>> from workbench import TaskModule
        >>> from workbench.models import MLP
        >>> from workbench.tasks import Classification
        >>> module = TaskModule(MLP(64, [100, 100], 10), Classification(10))
    """

    def step(self, batch: Any) -> Step:
        """The task's loss."""
        args, kwargs = self.task.inputs(batch)
        loss = self.task.loss(self.task.output(self.network(*args, **kwargs)), batch)
        return Step(loss, {"loss": loss}, self.task.valid(batch).sum())


def named(*parts: str) -> str:
    """A metric's name of those parts that are not empty: ``val/small/accuracy``."""
    return "/".join(part for part in parts if part)


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
