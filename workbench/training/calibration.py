"""Calibration data of a LightningModule: a few batches as its ``training_step`` gets them, and their loss.

Used while training goes on: the random state, the running epoch, logs and metrics are not changed.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, final

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from workbench.randomness import isolated
from workbench.training.module import SupervisedModule, network_of

# Attributes of a Metric that no batch changes.
_METRIC_CONSTANTS = {*vars(nn.Module()), "update", "compute", "_update_signature"}


@final
class FirstBatches:
    """The first batches of a loader, as ``training_step`` gets them; the same in every iteration.

    They are loaded in this process, one at a time, in the loader's own order.

    Args:
        loader: A DataLoader, or any iterable of batches.
        batches: Number of batches at most.
        module: A LightningModule of either namespace.
        data: The data module, for its hooks around the transfer of a batch.
        precision: The Trainer's precision plugin.
        inputs: Yield the arguments of the network, if the module is a SupervisedModule, instead of whole batches.

    Raises:
        ValueError: If there are several loaders.
    """

    def __init__(
        self, loader: Any, batches: int, module: Any, data: Any = None, precision: Any = None, inputs: bool = False
    ) -> None:
        if isinstance(loader, (Mapping, list, tuple)):
            loaders = list(loader.values() if isinstance(loader, Mapping) else loader)
            if any(isinstance(each, DataLoader) for each in loaders):
                raise ValueError(
                    f"there are {len(loaders)} training loaders, and calibration uses one: pass batches yourself"
                )
        self.loader, self.batches, self.inputs = loader, batches, inputs
        self.module, self.data, self.precision = module, data, precision

    def __iter__(self) -> Iterator[Any]:
        return isolated(self._batches(), self.batches)

    def _batches(self) -> Iterator[Any]:
        for batch in _without_workers(self.loader):
            yield self._transferred(batch)

    def _transferred(self, batch: Any) -> Any:
        if self.precision is not None:
            batch = self.precision.convert_input(batch)
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            of_data = self.data is not None and is_overridden(hook, self.data, LightningDataModule)
            batch = getattr(self.data if of_data else self.module, hook)(batch, 0)
        if not self.inputs or not isinstance(self.module, SupervisedModule):
            return batch
        args, kwargs = _inputs(self.module, batch)
        return kwargs or args


def _inputs(module: SupervisedModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the network in ``batch``, which may be paired with its teacher's cached outputs."""
    return module.task.inputs(batch.batch if hasattr(batch, "cached_targets") else batch)


def _without_workers(loader: Any) -> Iterable[Any]:
    """``loader`` without its workers, whose running epoch would end, and with copies of its samplers and streams."""
    if not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(copy.deepcopy(loader.dataset), loader.batch_size, collate_fn=loader.collate_fn)
    shared = {id(loader.dataset): loader.dataset}
    if loader.batch_sampler is None:
        sampler = copy.deepcopy(loader.sampler, shared)
        return DataLoader(loader.dataset, None, sampler=sampler, collate_fn=loader.collate_fn)
    sampler = copy.deepcopy(loader.batch_sampler, shared)
    return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)


@final
class TrainingLoss:
    """``loss(network, batch)``: the loss that a LightningModule's ``training_step`` returns for a batch.

    Args:
        module: A LightningModule of either namespace.
        precision: The Trainer's precision plugin.

    Raises:
        ValueError: If the module steps its optimizers by hand; when called, if the network is not the module's own, or
            ``training_step`` gives no loss.
    """

    def __init__(self, module: Any, precision: Any = None) -> None:
        if not getattr(module, "automatic_optimization", True):
            raise ValueError(
                f"{type(module).__name__} steps its optimizers in training_step, so it cannot give the loss alone: "
                "pass batches and a loss yourself"
            )
        self.module, self.precision = module, precision

    def __call__(self, network: nn.Module, batch: Any) -> Tensor:
        """The loss of ``network``, the module's own, on ``batch``."""
        if network is not network_of(self.module):
            raise ValueError(f"{type(self.module).__name__} computes the loss of its own network only, not of another")
        with (
            _without_logging(self.module),
            nullcontext() if self.precision is None else self.precision.forward_context(),
        ):
            return self._loss(batch)

    def _loss(self, batch: Any) -> Tensor:
        module = self.module
        if isinstance(module, SupervisedModule):
            return module.step(batch).loss
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(f"{type(module).__name__}.training_step fetches batches by itself: score by hand")
        loss = module.training_step(*(batch, 0)[: 2 if _takes_index(module) else 1])
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(module).__name__}.training_step gives {type(loss).__name__}, not a loss: return it, or do it "
                "by hand, with batches and a loss of your own"
            )
        return loss


def batch_runner(module: Any, precision: Any = None) -> Callable[[nn.Module, Any], Any]:
    """``run(network, batch)``: the module's forward pass on a batch as ``training_step`` gets it.

    For a module that is no SupervisedModule, whose network's arguments are unknown, it is :class:`TrainingLoss`.
    """
    if not isinstance(module, SupervisedModule):
        return TrainingLoss(module, precision)

    def run(network: nn.Module, batch: Any) -> Any:
        args, kwargs = _inputs(module, batch)
        with nullcontext() if precision is None else precision.forward_context():
            return module(*args, **kwargs)

    return run


def _takes_index(module: Any) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


@contextmanager
def _without_logging(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` logs nothing; afterwards its metrics and the random states of a family are restored."""
    states = dict(module.random_states.states) if isinstance(module, SupervisedModule) else {}
    metrics = [vars(each) for each in module.modules() if isinstance(each, Metric)]
    before = [
        {name: copy.deepcopy(value) for name, value in each.items() if name not in _METRIC_CONSTANTS}
        for each in metrics
    ]
    silent: Any = module
    silent.log = silent.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del silent.log, silent.log_dict
        if isinstance(module, SupervisedModule):
            module.random_states.states = states
        for each, state in zip(metrics, before):
            each.update(state)  # __setstate__ would wrap update and compute once more, which cannot sync twice
