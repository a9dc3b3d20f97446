"""What a kind of problem needs besides a model - how to read a batch, a loss, metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection

from workbench.tasks.outputs import OutputType


class Task(nn.Module, ABC):
    """A kind of problem. A module, so that a loss may have buffers; stateless otherwise.

    A training step is::

        args, kwargs = task.inputs(batch)
        output = scored(task, model(*args, **kwargs), batch)
        loss = task.loss(output, batch)
        metrics.update(output, task.targets(batch))      # metrics = task.metrics("val/"), kept by the caller
    """

    @property
    @abstractmethod
    def outputs(self) -> OutputType:
        """What :meth:`output` returns, in scored form."""

    @property
    @abstractmethod
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The main metric, by its name without prefix, and its better direction."""

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the model."""

    @abstractmethod
    def targets(self, batch: Any) -> Tensor:
        """What the output is compared with."""

    @abstractmethod
    def valid(self, batch: Any) -> Tensor:
        """Boolean, of the shape over which the loss averages: the positions that count.

        Their number weighs the loss of a batch when batches are put together.
        """

    @abstractmethod
    def output(self, raw: Any) -> Tensor:
        """The tensor to score, from the model's output."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """A scalar to minimise: the mean over the valid positions of the batch, with gradient."""

    @abstractmethod
    def metrics(self, prefix: str = "") -> MetricCollection:
        """Fresh metrics, updated with (output, targets), computed under ``prefix + name``."""


class Weighted(Task, ABC):
    """A task whose loss may be a weighted mean."""

    @abstractmethod
    def weight(self, batch: Any) -> Tensor:
        """The sum of the weights that the loss of a batch is divided by, a scalar."""


class Resized(Task, ABC):
    """A task whose networks may answer at another resolution than the labels'."""

    @abstractmethod
    def resized(self, output: Tensor, batch: Any) -> Tensor:
        """What :meth:`output` returned, at the positions of the batch's targets."""


def scored(task: Task, raw: Any, batch: Any) -> Tensor:
    """What a model returned for a batch, in the form that the task's loss and metrics take."""
    output = task.output(raw)
    return task.resized(output, batch) if isinstance(task, Resized) else output


def loss_weight(task: Task, batch: Any) -> Tensor:
    """What the loss of a batch weighs among others, a scalar: its valid positions, or the sum of their weights."""
    return task.weight(batch) if isinstance(task, Weighted) else task.valid(batch).sum()


def find_logits(raw: Any) -> Tensor | None:
    """The tensor itself, or ``logits`` of a mapping or of a transformers output; None if there are none."""
    logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", raw)
    return logits if isinstance(logits, Tensor) else None


def logits_of(raw: Any, who: str = "the model") -> Tensor:
    """What :func:`find_logits` finds in the output of ``who``.

    Raises:
        ValueError: If there are none.
    """
    if (logits := find_logits(raw)) is not None:
        return logits
    raise ValueError(
        f"{who} returned {type(raw).__name__} without logits: return a tensor, or an output or a "
        "mapping with 'logits' (in transformers a model with a head)."
    )


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: the last of a tuple (x, y), or ``labels`` of a mapping.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(batch, Mapping):
        labels, form = batch.get("labels"), f"a mapping of {', '.join(map(str, batch)) or 'nothing'}"
    else:
        labels = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        form = f"a {type(batch).__name__}"
    if isinstance(labels, Tensor):
        return labels
    raise ValueError(f"the batch is {form}, without a tensor of labels: give (x, y) or a mapping with 'labels'.")
