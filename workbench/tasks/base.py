"""What a kind of problem needs besides a model - how to read a batch, a loss, metrics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from workbench.tasks.outputs import OutputType

LogitsSpec = str | int | Callable[[Any], Tensor]
"""Where a network's logits are in what it returns: a key or an attribute, an index, or a function of it."""


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
        """What the network's outputs are; :meth:`output` returns them in scored form."""

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


def scored(task: Task, raw: Any, batch: Any, logits: LogitsSpec | None = None) -> Tensor:
    """What a model returned for a batch, in the form that the task's loss and metrics take.

    Args:
        task: The task.
        raw: What the model returned.
        batch: The batch.
        logits: Where its logits are in it, see :func:`select_logits`; None where the task finds them.
    """
    output = task.output(raw if logits is None else select_logits(raw, logits))
    return task.resized(output, batch) if isinstance(task, Resized) else output


def loss_weight(task: Task, batch: Any) -> Tensor:
    """What the loss of a batch weighs among others, a scalar: its valid positions, or the sum of their weights."""
    return task.weight(batch) if isinstance(task, Weighted) else task.valid(batch).sum()


def find_logits(raw: Any) -> Tensor | None:
    """The tensor itself, or ``logits`` of a mapping or of an output; None if there are none.

    Of a mapping without ``logits``, as torchvision's networks for segmentation return it, ``out``.
    """
    logits = raw.get("logits", raw.get("out")) if isinstance(raw, Mapping) else getattr(raw, "logits", raw)
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
        "mapping with 'logits' (in transformers a model with a head), or say by an argument logits where they are."
    )


def select_logits(raw: Any, spec: LogitsSpec | None = None, who: str = "the model") -> Tensor:
    """The logits among the outputs of ``who``, of a network that returns a dict, a tuple or several heads.

    Args:
        raw: What the network returned.
        spec: A key of a mapping or the name of an attribute; an index of a tuple or list; or a function of ``raw``.
            None for a tensor, or for an output with ``logits``, see :func:`logits_of`.
        who: Whose output it is, for messages.

    Raises:
        ValueError: If there is no tensor there.
    """
    if spec is None:
        return logits_of(raw, who)
    if callable(spec):
        found = spec(raw)
    elif isinstance(spec, int):
        # An output of transformers is a mapping that takes indices as well.
        values = raw.to_tuple() if hasattr(raw, "to_tuple") else raw
        found = values[spec] if isinstance(values, Sequence) and -len(values) <= spec < len(values) else None
    else:
        found = raw.get(spec) if isinstance(raw, Mapping) else getattr(raw, spec, None)
    if isinstance(found, Tensor):
        return found
    what = "what the function returned" if callable(spec) else repr(spec)
    raise ValueError(
        f"logits of {who} are {what}, which is {type(found).__name__} and no tensor, in {_form(raw)}: give the key, "
        "the index or a function of the output"
    )


def _form(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a mapping of {', '.join(map(str, raw)) or 'nothing'}"
    size = f" of {len(raw)}" if isinstance(raw, tuple | list) else ""
    return f"{type(raw).__name__}{size}"


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


def class_labels_of(batch: Any) -> Tensor:
    """The labels of a batch that are class numbers, as int64.

    Raises:
        ValueError: If there are none, or they are no integers.
    """
    labels = labels_of(batch)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: give class numbers as int64.")
    return labels.long()
