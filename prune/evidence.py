"""What criteria that look at data are shown: batches of a loader, and the loss of a LightningModule."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from prune.criteria import Criterion
from workbench.module import SupervisedModule, network_of
from workbench.randomness import same_random_state


def evidence(criterion: Criterion, module: Any, loader: Callable[[], Any], batches: int) -> dict[str, Any]:
    """The arguments ``loader`` and ``loss`` of a Pruner's call, as far as ``criterion`` needs them.

    They are the first batches of the training loader and the training loss of ``module``, which logs nothing there.
    Neither the random state nor an epoch that is under way is touched: batches are drawn in this process, in the
    loader's own order.

    Args:
        criterion: The Pruner's.
        module: A LightningModule of either namespace whose ``training_step`` returns a loss.
        loader: Gives the DataLoader, or any iterable of batches; asked only if needed.
        batches: How many, 1 or more.

    Raises:
        ValueError: If ``batches`` is less than 1, or when asked, if ``training_step`` gives no loss.
    """
    if not criterion.needs_loader:
        return {}
    if batches < 1:
        raise ValueError(f"batches is {batches}: criterion '{criterion.name}' looks at 1 or more")
    if criterion.needs_loss:
        return {"loader": _Few(loader(), batches), "loss": _Loss(module)}
    return {"loader": _Few(loader(), batches, module)}


class _Few:
    """The first batches of a loader; only what goes into the network of ``inputs_of``, where that is given."""

    def __init__(self, loader: Any, batches: int, inputs_of: Any = None) -> None:
        self.loader, self.batches, self.inputs_of = loader, batches, inputs_of

    def __iter__(self) -> Iterator[Any]:
        with same_random_state():
            found = list(islice(_plain(self.loader), self.batches))
        for batch in found:
            yield self._inputs(batch) if isinstance(self.inputs_of, SupervisedModule) else batch

    def _inputs(self, batch: Any) -> Any:
        if hasattr(batch, "taught"):  # a batch beside its teacher's cached answers
            batch = batch.batch
        args, kwargs = self.inputs_of.task.inputs(batch)
        return kwargs or args


def _plain(loader: Any) -> Iterable[Any]:
    """``loader`` without workers: asking persistent ones anew would end the epoch they are in."""
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, None, sampler=loader.sampler, collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)


class _Loss:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, network: nn.Module, batch: Any) -> Tensor:
        module = self.module
        if network is not network_of(module):
            raise ValueError(f"the loss of {type(module).__name__} is that of its own network, not of another")
        if isinstance(module, SupervisedModule):
            return module.step(batch).loss
        module.log = module.log_dict = lambda *_, **__: None
        try:
            loss = module.training_step(batch, 0)
        finally:
            del module.log, module.log_dict
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(module).__name__}.training_step gives {type(loss).__name__}, not a loss: criteria that look at "
                "data need one, so prune with Pruner(...)(model, density, loader=..., loss=...) yourself"
            )
        return loss
