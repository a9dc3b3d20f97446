"""What criteria that look at data are shown: batches of a loader, and the loss of a LightningModule."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from prune.criteria import Criterion
from workbench.module import SupervisedModule, network_of
from workbench.randomness import random_state, same_random_state, set_random_state


def evidence(
    criterion: Criterion,
    module: Any,
    loader: Callable[[], Any],
    batches: int,
    data: Any = None,
    precision: Any = None,
) -> dict[str, Any]:
    """The arguments ``loader`` and ``loss`` of a Pruner's call, as far as ``criterion`` needs them.

    They are the first batches of the training loader, as ``training_step`` gets them, and the loss that it gives.
    Nothing is logged and metrics of the module do not count. Neither the random state nor an epoch that is under way is
    touched: batches are drawn in this process, one at a time, in the loader's own order.

    Args:
        criterion: The Pruner's.
        module: A LightningModule of either namespace whose ``training_step`` returns a loss.
        loader: Gives the DataLoader, or any iterable of batches; asked only if needed.
        batches: How many, 1 or more.
        data: The data module, for its hooks around the transfer of a batch.
        precision: The Trainer's precision plugin.

    Raises:
        ValueError: If ``batches`` is less than 1, there are several loaders, the module steps by hand, or a family is
            asked for what one network is; when asked, if ``training_step`` gives no loss.
    """
    if not criterion.needs_loader:
        return {}
    if batches < 1:
        raise ValueError(f"batches is {batches}: criterion '{criterion.name}' looks at 1 or more")
    if criterion.needs_loss and not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} steps its optimizers in training_step, which criterion '{criterion.name}' would "
            "call for its loss: prune once before, with Pruner(...)(model, density, loader=..., loss=...)"
        )
    if not criterion.needs_loss and (family := getattr(module, "family", ())):
        raise ValueError(f"criterion '{criterion.name}' runs one network, and this is a family of {len(family)}")
    given = loader()
    if isinstance(given, (Mapping, list, tuple)) and any(isinstance(each, DataLoader) for each in _values(given)):
        raise ValueError(
            f"there are {len(given)} training loaders, and criterion '{criterion.name}' looks at one: prune once "
            "before, with Pruner(...)(model, density, loader=..., loss=...)"
        )
    few = _Few(given, batches, module, data, precision, inputs=not criterion.needs_loss)
    return {"loader": few, "loss": _Loss(module, precision)} if criterion.needs_loss else {"loader": few}


class _Few:
    """The first batches of a loader, as ``training_step`` gets them, or with ``inputs`` as the network does."""

    def __init__(self, loader: Any, batches: int, module: Any, data: Any, precision: Any, inputs: bool) -> None:
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
        if hasattr(batch, "taught"):  # a batch beside its teacher's cached answers
            batch = batch.batch
        args, kwargs = self.module.task.inputs(batch)
        return kwargs or args


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


class _Loss:
    def __init__(self, module: Any, precision: Any) -> None:
        self.module, self.precision = module, precision

    def __call__(self, network: nn.Module, batch: Any) -> Tensor:
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
                f"{type(module).__name__}.training_step gives {type(loss).__name__}, not a loss: criteria that look at "
                "data need one, so prune with Pruner(...)(model, density, loader=..., loss=...) yourself"
            )
        return loss


def _takes_index(module: Any) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


@contextmanager
def _unseen(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` logs nothing, and its metrics are afterwards what they were."""
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    before = [copy.deepcopy(metric.__getstate__()) for metric in metrics]
    silent: Any = module
    silent.log = silent.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del silent.log, silent.log_dict
        for metric, state in zip(metrics, before):
            metric.__setstate__(state)


def _values(loaders: Any) -> Iterable[Any]:
    return loaders.values() if isinstance(loaders, Mapping) else loaders
