"""What a LightningModule is looked at with: a few batches as its ``training_step`` gets them, and the loss it gives.

Neither the random state nor an epoch that is under way is touched, and nothing is logged or counted.
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

from workbench.randomness import random_state, same_random_state, set_random_state
from workbench.training.module import SupervisedModule, network_of

_FIXED = {*vars(nn.Module()), "update", "compute", "_update_signature"}  # of a metric: what no batch changes


@final
class FirstBatches:
    """The first batches of a loader, as ``training_step`` gets them; drawn anew, and the same, at every reading.

    They are drawn in this process, one at a time, in the loader's own order.

    Args:
        loader: A DataLoader, or any iterable of batches.
        batches: How many at most.
        module: A LightningModule of either namespace.
        data: The data module, for its hooks around the transfer of a batch.
        precision: The Trainer's precision plugin.
        inputs: Give what the network is called with, where the module says what that is.

    Raises:
        ValueError: If there are several loaders.
    """

    def __init__(
        self, loader: Any, batches: int, module: Any, data: Any = None, precision: Any = None, inputs: bool = False
    ) -> None:
        if isinstance(loader, (Mapping, list, tuple)):
            several = list(loader.values() if isinstance(loader, Mapping) else loader)
            if any(isinstance(each, DataLoader) for each in several):
                raise ValueError(
                    f"there are {len(several)} training loaders, and one is looked at: do it by hand, with batches of "
                    "your own"
                )
        self.loader, self.batches, self.inputs = loader, batches, inputs
        self.module, self.data, self.precision = module, data, precision

    def __iter__(self) -> Iterator[Any]:
        running, inside = None, None
        for _ in range(self.batches):
            with same_random_state():
                if inside is not None:
                    set_random_state(inside)
                if running is None:
                    running = iter(_plain(self.loader))
                try:
                    batch = self._shown(next(running))
                except StopIteration:
                    return
                inside = random_state()
            yield batch

    def _shown(self, batch: Any) -> Any:
        if self.precision is not None:
            batch = self.precision.convert_input(batch)
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            theirs = self.data is not None and is_overridden(hook, self.data, LightningDataModule)
            batch = getattr(self.data if theirs else self.module, hook)(batch, 0)
        if not self.inputs or not isinstance(self.module, SupervisedModule):
            return batch
        args, kwargs = _inputs(self.module, batch)
        return kwargs or args


def _inputs(module: SupervisedModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the network in ``batch``, which may lie beside its teacher's cached answers."""
    return module.task.inputs(batch.batch if hasattr(batch, "cached_targets") else batch)


def _plain(loader: Any) -> Iterable[Any]:
    """``loader`` without workers, whose epoch would end, and with samplers and streams of its own."""
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
class Loss:
    """``loss(network, batch)`` that a LightningModule's ``training_step`` gives, for a batch as that gets it.

    Args:
        module: Of either namespace.
        precision: The Trainer's precision plugin.

    Raises:
        ValueError: If the module steps its optimizers by hand; when called, if the network is not the module's own, or
            ``training_step`` gives no loss.
    """

    def __init__(self, module: Any, precision: Any = None) -> None:
        if not getattr(module, "automatic_optimization", True):
            raise ValueError(
                f"{type(module).__name__} steps its optimizers in training_step, which would be called for its loss: "
                "do it by hand, with batches and a loss of your own"
            )
        self.module, self.precision = module, precision

    def __call__(self, network: nn.Module, batch: Any) -> Tensor:
        """The loss of ``network``, the module's own, on ``batch``."""
        if network is not network_of(self.module):
            raise ValueError(f"the loss of {type(self.module).__name__} is that of its own network, not of another")
        with _unseen(self.module), nullcontext() if self.precision is None else self.precision.forward_context():
            return self._given(batch)

    def _given(self, batch: Any) -> Tensor:
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


def runs(module: Any, precision: Any = None) -> Callable[[nn.Module, Any], Any]:
    """``run(network, batch)`` that passes a batch, as ``training_step`` gets it, through the module's network.

    Where the module does not say what of a batch its network takes, it is :class:`Loss`.
    """
    if not isinstance(module, SupervisedModule):
        return Loss(module, precision)

    def run(network: nn.Module, batch: Any) -> Any:
        args, kwargs = _inputs(module, batch)
        with nullcontext() if precision is None else precision.forward_context():
            return module(*args, **kwargs)

    return run


def _takes_index(module: Any) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


@contextmanager
def _unseen(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` logs nothing; its metrics, and what a family draws from, are afterwards what they were."""
    streams = dict(module.streams.states) if isinstance(module, SupervisedModule) else {}
    metrics = [vars(each) for each in module.modules() if isinstance(each, Metric)]
    before = [{name: copy.deepcopy(value) for name, value in each.items() if name not in _FIXED} for each in metrics]
    silent: Any = module
    silent.log = silent.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del silent.log, silent.log_dict
        if isinstance(module, SupervisedModule):
            module.streams.states = streams
        for each, state in zip(metrics, before):
            each.update(state)  # __setstate__ would wrap update and compute once more, which cannot sync twice
