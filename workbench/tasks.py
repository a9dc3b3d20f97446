"""Tasks: what a kind of problem needs besides a model - how to read a batch, a loss, metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_NOTHING = torch.iinfo(torch.int64).min  # an ignore_index that no target has


class Task(nn.Module, ABC):
    """A kind of problem. A module, so that a loss may have buffers; stateless otherwise.

    A training step is::

        args, kwargs = task.inputs(batch)
        output = task.output(model(*args, **kwargs))
        loss = task.loss(output, batch)
        metrics.update(output, task.targets(batch))      # metrics = task.metrics("val/"), kept by the caller
    """

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
        """The tensor to score, out of whatever the model returned."""

    @abstractmethod
    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """A scalar to minimise: the mean over the valid positions of the batch, with gradient."""

    @abstractmethod
    def metrics(self, prefix: str = "") -> MetricCollection:
        """Fresh metrics, updated with (output, targets), computed under ``prefix + name``."""


def _valid(targets: Tensor, ignore_index: int | None) -> Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, ignore_index: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats over positions that are not ignored; 0, with its graph, when all are.

    -sum_c q_c log softmax(z)_c with q = (1 - s) onehot(y) + s / C (Szegedy et al. 2016, arXiv:1512.00567).
    Half precision is scored in float32.

    Args:
        logits: z, [..., C].
        targets: y, int64 [...].
        label_smoothing: s in [0, 1).
        ignore_index: The target of positions that do not count.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    skip = _NOTHING if ignore_index is None else ignore_index
    if ignore_index is not None:
        # Before the softmax: whatever stands at such a position, NaN too, must not reach the gradient of the others.
        logits = logits.masked_fill((targets == skip)[..., None], 0.0)
    total = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=skip,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / _valid(targets, ignore_index).sum().clamp(min=1)


@final
class Accuracy(Metric):
    """Share of valid positions whose largest logit is the target's; NaN over none.

    Logits [..., C], targets [...].

    Args:
        ignore_index: The target of positions that do not count.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    correct: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        valid = _valid(targets, self.ignore_index)
        # Not in place: a metric reset in inference mode holds tensors that may not be updated outside of it.
        self.correct = self.correct + ((logits.argmax(-1) == targets) & valid).sum()
        self.count = self.count + valid.sum()

    def compute(self) -> Tensor:
        """The share so far."""
        return self.correct / self.count


@final
class NLL(Metric):
    """Mean negative log-likelihood in nats over valid positions, without smoothing; NaN over none.

    Logits [..., C], targets [...].

    Args:
        ignore_index: The target of positions that do not count.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        valid = _valid(targets, self.ignore_index).sum()
        self.total = self.total + cross_entropy(logits, targets, ignore_index=self.ignore_index) * valid
        self.count = self.count + valid

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@final
class Classification(Task):
    """One class out of several for each sample, logits [B, C], or for each position, logits [B, L, C].

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries
    the model gets by keyword. Labels are integers, [B] or [B, L].

    Args:
        classes: C.
        label_smoothing: Weight of the uniform distribution in the loss, in [0, 1); see `cross_entropy`.
        ignore_index: Label of positions that count neither in the loss nor in the metrics, such as padding
            (-100 by the habit of transformers); by default every position counts and such a label is an
            error.

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0, ignore_index: int | None = None) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes}: give at least 2.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: give at least 0 and less than 1.")
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Accuracy, the higher the better."""
        return "accuracy", "max"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but labels) of a mapping."""
        self.targets(batch)
        if isinstance(batch, Mapping):
            return (), {str(key): value for key, value in batch.items() if key != "labels"}
        return tuple(batch[:-1]), {}

    def targets(self, batch: Any) -> Tensor:
        """Labels, int64 [B] or [B, L]."""
        if isinstance(batch, Mapping):
            labels, form = batch.get("labels"), f"a mapping of {', '.join(map(str, batch)) or 'nothing'}"
        else:
            labels = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
            form = f"a {type(batch).__name__}"
        if isinstance(labels, Tensor):
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise ValueError(f"labels are {labels.dtype}: give class numbers as int64.")
            return labels.long()
        raise ValueError(f"the batch is {form}, without a tensor of labels: give (x, y) or a mapping with 'labels'.")

    def valid(self, batch: Any) -> Tensor:
        """[B] or [B, L]: the label is not ``ignore_index``."""
        return _valid(self.targets(batch), self.ignore_index)

    def output(self, raw: Any) -> Tensor:
        """Logits: the tensor itself, or ``logits`` of a mapping or of a transformers output."""
        logits = raw if isinstance(raw, Tensor) else getattr(raw, "logits", None)
        if logits is None and isinstance(raw, Mapping):
            logits = raw.get("logits")
        if isinstance(logits, Tensor):
            return logits
        raise ValueError(
            f"the model returned {type(raw).__name__} without logits: return a tensor, or an output or a "
            "mapping with 'logits' (in transformers a model with a classification head)."
        )

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean `cross_entropy` over valid positions; logits [B, C] or [B, L, C] -> scalar."""
        labels = self.targets(batch)
        if output.shape != (*labels.shape, self.classes):
            raise ValueError(
                f"logits are {list(output.shape)} for labels {list(labels.shape)}, expected "
                f"{[*labels.shape, self.classes]}: fit the model's output to classes={self.classes}."
            )
        return cross_entropy(output, labels, self.label_smoothing, self.ignore_index)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """Accuracy in [0, 1] and nll in nats, each over all valid positions seen, however batched."""
        return MetricCollection(
            {"accuracy": Accuracy(self.ignore_index), "nll": NLL(self.ignore_index)},
            compute_groups=False,
            prefix=prefix,
        )
