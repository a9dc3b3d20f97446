"""What a criterion that needs data is calibrated on: batches of a loader, and the loss of a LightningModule."""

from collections.abc import Callable
from typing import Any

from prune.criteria import Criterion
from workbench.training.calibration import FirstBatches, TrainingLoss


def calibration(
    criterion: Criterion,
    module: Any,
    loader: Callable[[], Any],
    batches: int,
    data: Any = None,
    precision: Any = None,
) -> dict[str, Any]:
    """The arguments ``loader`` and ``loss`` of a Pruner's call; empty if ``criterion`` needs no data.

    They are the first batches of the training loader, as ``training_step`` gets them, and the loss that it returns.
    Nothing is logged, and metrics of the module do not count. Neither the random state nor a running epoch is touched:
    batches are drawn in this process, one at a time, in the loader's own order.

    Args:
        criterion: The Pruner's.
        module: A LightningModule of either namespace whose ``training_step`` returns a loss.
        loader: Gives the DataLoader, or any iterable of batches; called only if needed.
        batches: How many, 1 or more.
        data: The data module, for its hooks around the transfer of a batch.
        precision: The Trainer's precision plugin.

    Raises:
        ValueError: If ``batches`` is less than 1, there are several loaders, the module steps by hand, or the module is
            a family and the criterion runs one network; when called, if ``training_step`` returns no loss.
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
    loss = {"loss": TrainingLoss(module, precision)} if criterion.needs_loss else {}
    if not criterion.needs_loss and (family := getattr(module, "family", ())):
        raise ValueError(f"criterion '{criterion.name}' runs one network, and this is a family of {len(family)}")
    few = FirstBatches(loader(), batches, module, data, precision, inputs=not criterion.needs_loss)
    return {"loader": few, **loss}


def trainer_calibration(trainer: Any, module: Any, criterion: Criterion, batches: int) -> dict[str, Any]:
    """:func:`calibration` on the training data of a running Trainer."""
    precision = trainer.precision_plugin
    return calibration(criterion, module, lambda: trainer.train_dataloader, batches, trainer.datamodule, precision)
