"""Scores of logits against independent yes-or-no labels: cross-entropy as a loss, and metrics.

Logits and labels have one shape. A label is 0 or 1, integer or bool, or the probability of a 1; one that is NaN or
``ignore_index`` counts nowhere. Metrics take a label above .5 for a yes, and a logit above 0.
"""

import math
from collections.abc import Callable
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.utilities import dim_zero_cat


def valid_labels(labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """Bool, of the labels' shape: the label is neither NaN nor ``ignore_index``."""
    # Bytes would take -100 for 156.
    labels = labels if labels.is_floating_point() else labels.long()
    return ~labels.isnan() if ignore_index is None else ~labels.isnan() & (labels != ignore_index)


def label_pair(logits: Tensor, labels: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in at least float32 and labels in their precision, both 0 where no label counts; and bool, where it does.

    Raises:
        ValueError: If the shapes differ or, on a CPU, a label is outside of [0, 1]; on a GPU, where looking would wait
            for it, such a label becomes NaN.
    """
    if logits.shape != labels.shape:
        raise ValueError(
            f"logits are {list(logits.shape)} for labels {list(labels.shape)}: give the network one output for each."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = valid_labels(labels, ignore_index)
    # Both, so that NaN at such a place does not reach the gradient of the others.
    logits, targets = logits.masked_fill(~valid, 0.0), labels.to(logits.dtype).masked_fill(~valid, 0.0)
    outside = (targets < 0) | (targets > 1)
    if targets.device.type == "cpu":
        if bool(outside.any()):
            raise ValueError(
                f"labels hold {targets[outside][0]:g}: give 0 and 1, or probabilities, and name the label of what does "
                "not count by ignore_index."
            )
        return logits, targets, valid
    return logits, targets.masked_fill(outside, math.nan), valid


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Mean over labels that count of the cross-entropy of a sigmoid, in nats; 0, with its graph, over none.

    -(w q log sigmoid(z) + (1 - q) log(1 - sigmoid(z))) with q = (1 - s) y + s / 2. Half precision is scored in float32.

    Args:
        logits: z, of any shape.
        labels: y in [0, 1], of the same shape.
        label_smoothing: s in [0, 1).
        ignore_index: The label of what does not count.
        pos_weight: w, what is broadcast to the shape; 1 if None. As in torch, the mean is not divided by it.

    Raises:
        ValueError: See :func:`label_pair`.
    """
    logits, targets, valid = label_pair(logits, labels, ignore_index)
    if label_smoothing:
        targets = (1 - label_smoothing) * targets + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(
        logits, targets, reduction="none", pos_weight=None if pos_weight is None else pos_weight.to(logits)
    )
    return losses.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def check_pos_weight(pos_weight: float | list[float] | None, labels: int | None = None) -> Tensor | None:
    """The weights of a yes as a tensor, [] or [labels].

    Raises:
        ValueError: If one is not above 0 and finite, or there is not one for each label.
    """
    if pos_weight is None:
        return None
    weights = torch.tensor(pos_weight, dtype=torch.float32)
    if weights.ndim and weights.shape != (labels,):
        raise ValueError(f"pos_weight has {len(weights)} numbers for labels={labels}: give one for each, or one.")
    if not (weights.isfinite() & (weights > 0)).all():
        raise ValueError(f"pos_weight={pos_weight}: give finite numbers above 0.")
    return weights


@final
class LabelAccuracy(Metric):
    """Share of labels that are predicted right, in [0, 1]; NaN over none.

    Args:
        ignore_index: The label of what does not count.
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

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        logits, targets, valid = label_pair(logits, labels, self.ignore_index)
        # Not in place: a metric reset in inference mode holds tensors that may not be updated outside of it.
        self.correct = self.correct + (((logits > 0) == (targets > 0.5)) & valid).sum()
        self.count = self.count + valid.sum()

    def compute(self) -> Tensor:
        """The share so far."""
        return self.correct / self.count


@final
class LabelNLL(Metric):
    """Mean of :func:`binary_cross_entropy` over labels that count, without smoothing and weights; NaN over none.

    Args:
        ignore_index: The label of what does not count.
        of_loss: Whether the task's loss is this very mean, so that ``loss`` of :meth:`update` saves computing it again.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None, of_loss: bool = False) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.of_loss = of_loss
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch; ``loss`` is the task's own of the same batch, a scalar."""
        if loss is None or not self.of_loss:
            loss = binary_cross_entropy(logits, labels, ignore_index=self.ignore_index)
        count = valid_labels(labels, self.ignore_index).sum()
        self.total = self.total + loss.detach() * count
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@final
class F1(Metric):
    """2 tp / (2 tp + fp + fn), in [0, 1], counted over the whole split; 0 where there is no yes; NaN over no label.

    Args:
        average: ``micro`` counts all labels together; ``macro`` is the mean over labels, without those of which none
            counts.
        labels: Number of labels, for ``macro``.
        label_dim: Their axis.
        ignore_index: The label of what does not count.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        average: Literal["micro", "macro"] = "micro",
        labels: int = 1,
        label_dim: int = -1,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.average = average
        self.label_dim = label_dim
        self.ignore_index = ignore_index
        # Rows: true positives, errors of either kind, labels that count.
        self.add_state("counts", torch.zeros(3, labels, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        logits, targets, valid = label_pair(logits, labels, self.ignore_index)
        yes, right = logits > 0, targets > 0.5
        rows = torch.stack((yes & right & valid, (yes != right) & valid, valid))
        rows = rows.flatten(1).unsqueeze(-1) if self.average == "micro" else _by_label(rows, self.label_dim)
        self.counts = self.counts + rows.sum(1)

    def compute(self) -> Tensor:
        """The score so far."""
        right, wrong, count = self.counts
        scores = 2 * right / (2 * right + wrong).clamp(min=1)
        return scores.masked_fill(count == 0, math.nan).nanmean()


@final
class RankedScore(Metric):
    """A score of how a label's yeses rank among its logits, such as :func:`auroc`; it keeps every logit of a split.

    Args:
        score: (ranks in [0, 1], labels) -> the score of one label, as in torchmetrics.functional.
        needs_no: Whether the score is defined only where there is a no as well.
        labels: Number of labels; the score is their mean, those without a score left out. 1 takes all together.
        label_dim: Their axis.
        ignore_index: The label of what does not count.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        score: Callable[[Tensor, Tensor], Tensor],
        needs_no: bool,
        labels: int = 1,
        label_dim: int = -1,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.score, self.needs_no = score, needs_no
        self.number, self.label_dim, self.ignore_index = labels, label_dim, ignore_index
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch."""
        logits, targets, valid = label_pair(logits, labels, self.ignore_index)
        state = (targets > 0.5).to(torch.int8).masked_fill(~valid, -1)
        if self.number > 1:
            logits, state = _by_label(logits[None], self.label_dim)[0], _by_label(state[None], self.label_dim)[0]
        else:
            logits, state = logits.reshape(-1, 1), state.reshape(-1, 1)
        self.logits.append(logits.detach())
        self.labels.append(state)

    def compute(self) -> Tensor:
        """The score so far."""
        if not len(self.logits):
            return torch.tensor(math.nan, device=self.device)
        logits, labels = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
        scores = [self._score(z, y) for z, y in zip(logits.unbind(1), labels.unbind(1))]
        return torch.stack(scores).nanmean()

    def _score(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits[labels >= 0], labels[labels >= 0].long()
        yes = int(labels.sum())
        if yes == 0 or (self.needs_no and yes == len(labels)):
            return logits.new_tensor(math.nan)
        # Ranks instead of probabilities: a sigmoid rounds large logits to 1, which makes them equal.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        ranks = logits.unique(return_inverse=True)[1].to(wide)
        return self.score(ranks / ranks.max().clamp(min=1), labels).to(logits.dtype)


def auroc(ignore_index: int | None = None) -> RankedScore:
    """Area under the ROC curve over all labels of a split together, in [0, 1]; NaN where all are yes or all are no."""
    return RankedScore(binary_auroc, needs_no=True, ignore_index=ignore_index)


def average_precision(labels: int, label_dim: int = -1, ignore_index: int | None = None) -> RankedScore:
    """Mean over labels of the average precision, in [0, 1]; labels without a yes are left out, NaN where all are."""
    return RankedScore(binary_average_precision, False, labels, label_dim, ignore_index)


def _by_label(rows: Tensor, label_dim: int) -> Tensor:
    """[K, *shape] with the labels at ``label_dim`` of the shape -> [K, positions, labels]."""
    moved = rows.movedim(label_dim if label_dim < 0 else label_dim + 1, -1)
    return moved.flatten(1, -2)
