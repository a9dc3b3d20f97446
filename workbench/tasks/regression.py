"""Regression: numbers for each sample, or for each of its steps."""

import math
from typing import Any, Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from workbench.models.forward import inputs_of
from workbench.tasks.base import Task, labels_of, logits_of
from workbench.tasks.outputs import OutputType

Kind = Literal["mse", "mae", "huber"]


@final
class Regression(Task):
    """Numbers that are to be hit, targets [B], [B, D] or [B, H, D] ..., and outputs of the same shape.

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries the model
    gets by keyword. A target that is NaN counts neither in the loss nor in the metrics.

    Loss, mean over valid elements with e = output - target: ``mse`` e^2; ``mae`` ``|e|``; ``huber`` e^2 / 2 up to
    ``|e| = delta``, ``delta (|e| - delta / 2)`` beyond (Huber 1964, "Robust estimation of a location parameter").

    Args:
        kind: The loss.
        delta: Where Huber's loss turns linear, above 0.
        shape: What a sample's output is brought to where a network gives it otherwise, e.g. [24, 7] for 168 numbers in
            a row, [] for the single number of [B, 1]; by default it stays as it is.

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    def __init__(self, kind: Kind = "mse", delta: float = 1.0, shape: list[int] | None = None) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r}: use one of {', '.join(get_args(Kind))}.")
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta}: give a finite number above 0.")
        if shape is not None and any(size < 1 for size in shape):
            raise ValueError(f"shape={list(shape)}: give sizes of at least 1.")
        self.kind: Kind = kind
        self.delta = delta
        self.shape = None if shape is None else tuple(shape)

    @property
    def outputs(self) -> OutputType:
        """Numbers."""
        return OutputType("numbers")

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Mean squared error, the lower the better."""
        return "mse", "min"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but label, labels and label_ids) of a mapping."""
        labels_of(batch)
        return inputs_of(batch)

    def targets(self, batch: Any) -> Tensor:
        """Targets in floating point, NaN where none counts."""
        targets = labels_of(batch)
        if targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"labels are {targets.dtype}: give numbers, as float32.")
        return targets if targets.is_floating_point() else targets.to(torch.get_default_dtype())

    def valid(self, batch: Any) -> Tensor:
        """Of the targets' shape: the target is a number."""
        return ~self.targets(batch).isnan()

    def output(self, raw: Any) -> Tensor:
        """The tensor itself, or ``logits`` of a mapping or of a transformers output; in the task's shape."""
        output = logits_of(raw)
        if self.shape is None:
            return output
        if output.ndim == 0 or output[0].numel() != math.prod(self.shape):
            raise ValueError(
                f"the output is {list(output.shape)}, which is not {math.prod(self.shape)} numbers a sample for "
                f"shape={list(self.shape)}: give the network as many outputs."
            )
        return output.reshape(len(output), *self.shape)

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean over valid elements; 0, with its graph, if there is none. Half precision is scored in float32."""
        output, targets, valid = masked_pair(output, self.targets(batch))
        if self.kind == "huber":
            total = F.huber_loss(output, targets, reduction="sum", delta=self.delta)
        else:
            total = (F.mse_loss if self.kind == "mse" else F.l1_loss)(output, targets, reduction="sum")
        return total / valid.sum().clamp(min=1)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """Metrics: mse, mae, r2, each over all valid elements seen, however batched."""
        return MetricCollection(
            {"mse": MeanError("mse"), "mae": MeanError("mae"), "r2": R2()}, compute_groups=False, prefix=prefix
        )


def masked_pair(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in the wider of their precisions, at least float32, 0 where the target is NaN; and bool, where it is not.

    Raises:
        ValueError: If the shapes differ.
    """
    if output.shape != targets.shape:
        raise ValueError(
            f"the output is {list(output.shape)} for targets {list(targets.shape)}: give the network as many outputs, "
            f"or bring them to that shape by shape={list(targets.shape[1:])}."
        )
    dtype = torch.promote_types(torch.promote_types(output.dtype, targets.dtype), torch.float32)
    valid = ~targets.isnan()
    # Both, so that NaN at such a place does not reach the gradient of the others.
    return output.to(dtype).masked_fill(~valid, 0.0), targets.to(dtype).masked_fill(~valid, 0.0), valid


@final
class MeanError(Metric):
    """Mean squared or absolute difference of output and targets over elements whose target is no NaN; NaN over none.

    Args:
        kind: "mse" or "mae".
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, kind: Literal["mse", "mae"] = "mse") -> None:
        super().__init__()
        self.kind = kind
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        output, targets, valid = masked_pair(output, targets)
        error = output - targets
        # Not in place: a metric reset in inference mode holds tensors that may not be updated outside of it.
        self.total = self.total + (error.square() if self.kind == "mse" else error.abs()).sum()
        self.count = self.count + valid.sum()

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@final
class R2(Metric):
    """1 - sum (y - output)^2 / sum (y - mean y)^2 over all elements whose target is no NaN, at most 1.

    One mean for all targets together. NaN where they do not vary, or over none.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = True
    count: Tensor
    mean: Tensor
    spread: Tensor
    missed: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Each rank's own, merged by compute: sums of squares of all ranks would cancel where the mean is large.
        self.add_state("count", torch.tensor(0), dist_reduce_fx=None)
        for name in ("mean", "spread", "missed"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx=None)

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        output, targets, valid = masked_pair(output, targets)
        count = valid.sum()
        mean = targets.sum() / count.clamp(min=1)
        spread = (targets - mean).masked_fill(~valid, 0.0).square().sum()
        counts, means = torch.stack((self.count, count)), torch.stack((self.mean, mean))
        spreads = torch.stack((self.spread, spread))
        self.count, self.mean, self.spread = _merge_moments(counts, means, spreads)
        self.missed = self.missed + (output - targets).square().sum()

    def compute(self) -> Tensor:
        """The share so far."""
        _, _, spread = _merge_moments(self.count.view(-1), self.mean.view(-1), self.spread.view(-1))
        return torch.where(spread > 0, 1 - self.missed.sum() / spread, torch.nan)


def _merge_moments(counts: Tensor, means: Tensor, spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of several samples together.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return count, mean, spreads.sum() + (counts * (means - mean).square()).sum()
