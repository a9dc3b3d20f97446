"""Scores of logits against targets: cross-entropy as a loss, and metrics."""

from abc import ABC
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

_NOTHING = torch.iinfo(torch.int64).min  # an ignore_index that no target has


def valid_mask(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Bool, True where the target is not ``ignore_index``."""
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

    Raises:
        ValueError: On CPU, if a label is no class.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    skip = _NOTHING if ignore_index is None else ignore_index
    if ignore_index is not None:
        # Before the softmax: NaN at such a position must not reach the gradient of the others.
        logits = logits.masked_fill((targets == skip)[..., None], 0.0)
    try:
        total = F.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
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
    return total / valid_mask(targets, ignore_index).sum().clamp(min=1)


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
        valid = valid_mask(targets, self.ignore_index).sum()
        self.total = self.total + cross_entropy(logits, targets, ignore_index=self.ignore_index) * valid
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
