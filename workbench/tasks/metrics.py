"""Scores of logits against targets: cross-entropy as a loss, and metrics."""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Align = Callable[[Tensor, Tensor], Tensor]

_NOTHING = torch.iinfo(torch.int64).min  # an ignore_index that no target has


def valid_mask(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Bool, True where the target is not ``ignore_index``."""
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in nats over positions that are not ignored; 0, with its graph, when all are.

    -sum_c w_c q_c log softmax(z)_c with q = (1 - s) onehot(y) + s / C (Szegedy et al. 2016, arXiv:1512.00567).
    With class weights the mean is that of torch: the sum over positions, divided by the sum of w_y.
    Half precision is scored in float32.

    Args:
        logits: z, [..., C].
        targets: y, int64 [...].
        label_smoothing: s in [0, 1).
        ignore_index: The target of positions that do not count.
        class_weights: w, [C]; all 1 if None.

    Raises:
        ValueError: On CPU, if a label is no class.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    skip = _NOTHING if ignore_index is None else ignore_index
    if ignore_index is not None:
        # Before the softmax: NaN at such a position must not reach the gradient of the others.
        logits = logits.masked_fill((targets == skip)[..., None], 0.0)
    weights = None if class_weights is None else class_weights.to(logits)
    dense = logits.movedim(-1, 1) if logits.ndim > 2 else logits
    # A network that has its classes at axis 1 is scored as it stands, without a copy that has them last.
    # On a GPU that way is not deterministic, and torch refuses it where it has to be.
    flat = not (logits.ndim > 2 and dense.is_contiguous()) or torch.are_deterministic_algorithms_enabled()
    try:
        total = F.cross_entropy(
            logits.flatten(0, -2) if flat else dense,
            targets.flatten() if flat else targets,
            weight=weights,
            ignore_index=skip,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
    except IndexError as error:  # on a GPU the device reports it later
        counted = targets[targets != skip]
        raise ValueError(
            f"labels go from {int(counted.min())} to {int(counted.max())} and logits score {logits.shape[-1]} classes: "
            "give the model as many outputs as there are classes"
        ) from error
    if weights is None:
        return total / valid_mask(targets, ignore_index).sum().clamp(min=1)
    return total / weight_sum(targets, weights, ignore_index).clamp(min=torch.finfo(total.dtype).tiny)


def weight_sum(targets: Tensor, class_weights: Tensor | None, ignore_index: int | None = None) -> Tensor:
    """Sum of the weights [C] of the targets' classes, int64 [...], over positions that are not ignored; a scalar.

    Without weights the number of these positions.
    """
    valid = valid_mask(targets, ignore_index)
    if class_weights is None:
        return valid.sum()
    weights = class_weights.to(targets.device)[targets.masked_fill(~valid, 0)]
    return weights.masked_fill(~valid, 0).sum()


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises: ValueError: unless it is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: give at least 0 and less than 1.")


def check_class_weights(class_weights: Sequence[float] | None, classes: int) -> Tensor | None:
    """The weights as a tensor [C].

    Raises:
        ValueError: If there is not one for each class, one is negative or not finite, or all are 0.
    """
    if class_weights is None:
        return None
    weights = torch.tensor(class_weights, dtype=torch.float32)
    if weights.shape != (classes,):
        raise ValueError(f"class_weights are {list(weights.shape)} for classes={classes}: give one for each class.")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"class_weights={list(class_weights)}: give finite numbers of at least 0, not all 0.")
    return weights


def update_metrics(metrics: MetricCollection, output: Tensor, targets: Tensor, loss: Tensor) -> None:
    """Update with a batch, whose ``loss`` saves those metrics that are its mean from computing it again."""
    shares = any(getattr(metric, "of_loss", False) for metric in metrics.values(copy_state=False))
    metrics.update(output, targets, **({"loss": loss} if shares else {}))


@final
class Accuracy(Metric):
    """Share of valid positions whose largest logit is the target's; NaN over none.

    Logits [..., C], targets [...].

    Args:
        ignore_index: The target of positions that do not count.
        align: (logits, targets) -> logits at the targets' positions, where they come at others.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    correct: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None, align: Align | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.align = align
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        logits = logits if self.align is None else self.align(logits, targets)
        valid = valid_mask(targets, self.ignore_index)
        # Not in place: a metric reset in inference mode holds tensors that may not be updated outside of it.
        self.correct = self.correct + ((logits.argmax(-1) == targets) & valid).sum()
        self.count = self.count + valid.sum()

    def compute(self) -> Tensor:
        """The share so far."""
        return self.correct / self.count


class _LikelihoodMetric(Metric, ABC):
    """Sum of the negative log-likelihood over valid positions, and their number.

    Args:
        ignore_index: The target of positions that do not count.
        align: (logits, targets) -> logits at the targets' positions, where they come at others.
        of_loss: Whether the task's loss is this very mean, so that ``loss`` of :meth:`update` saves computing it again.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None, align: Align | None = None, of_loss: bool = False) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.align = align
        self.of_loss = of_loss
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch; ``loss`` is the task's own of the same batch, a scalar."""
        valid = valid_mask(targets, self.ignore_index).sum()
        if loss is None or not self.of_loss:
            logits = logits if self.align is None else self.align(logits, targets)
            loss = cross_entropy(logits, targets, ignore_index=self.ignore_index)
        self.total = self.total + loss.detach() * valid
        self.count = self.count + valid


@final
class NLL(_LikelihoodMetric):
    """Mean negative log-likelihood in nats over valid positions, without smoothing; NaN over none.

    Logits [..., C], targets [...].
    """

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@final
class Perplexity(_LikelihoodMetric):
    """Exponential of the mean negative log-likelihood over valid positions, at least 1; NaN over none.

    Logits [..., C], targets [...].
    """

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return (self.total / self.count).exp()
