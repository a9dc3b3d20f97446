"""Multi-label classification: any number of labels for each sample, independent of each other."""

from typing import Any, Literal, final

from torch import Tensor
from torchmetrics import MetricCollection

from workbench.models.forward import inputs_of
from workbench.tasks.base import Task, labels_of, logits_of
from workbench.tasks.labels import (
    F1,
    LabelAccuracy,
    LabelNLL,
    average_precision,
    binary_cross_entropy,
    check_pos_weight,
    valid_labels,
)
from workbench.tasks.metrics import check_label_smoothing
from workbench.tasks.outputs import OutputType


@final
class MultiLabel(Task):
    """A yes or no for each of L labels, logits and labels [B, L]; for each position [B, T, L], or [B, L, H, W].

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries the model
    gets by keyword. Labels are 0 or 1, integer, bool or floating point, or the probability of a 1; one that is NaN is
    missing: it counts neither in the loss nor in the metrics.

    Loss: :func:`~workbench.tasks.labels.binary_cross_entropy`, the mean over all labels of all samples. Metrics, over a
    whole split: ``f1`` (micro) and ``f1_macro`` at a probability of .5; ``average_precision`` (mAP), the mean over
    labels that have a yes, which keeps all logits; ``accuracy``, the share of labels that are right; ``nll`` in nats.

    Args:
        labels: L.
        pos_weight: Weight of the yeses in the loss, above 0, as in `torch.nn.BCEWithLogitsLoss`: one number, or one for
            each label; the metrics have none.
        label_smoothing: s in [0, 1): labels go to (1 - s) y + s / 2 in the loss.
        ignore_index: Label that is missing, such as -1 or -100; by default an error.
        label_dim: The axis of the labels: -1, or 1 for [B, L, H, W].

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        labels: int,
        pos_weight: float | list[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        label_dim: int = -1,
    ) -> None:
        super().__init__()
        if labels < 1:
            raise ValueError(f"labels={labels}: give at least 1.")
        check_label_smoothing(label_smoothing)
        if label_dim not in (-1, 1):
            raise ValueError(f"label_dim={label_dim}: give -1 or 1.")
        self.register_buffer("pos_weight", check_pos_weight(pos_weight, labels), persistent=False)
        self.labels = labels
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.label_dim = label_dim

    @property
    def outputs(self) -> OutputType:
        """Labels."""
        return OutputType("labels")

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Micro F1, the higher the better."""
        return "f1", "max"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but label, labels and label_ids) of a mapping."""
        self.targets(batch)
        return inputs_of(batch)

    def targets(self, batch: Any) -> Tensor:
        """Labels, [B, L] or with positions."""
        labels = labels_of(batch)
        if labels.is_complex():
            raise ValueError(f"labels are {labels.dtype}: give 0 and 1.")
        if labels.ndim < 2 or labels.shape[self.label_dim] != self.labels:
            raise ValueError(
                f"labels are {list(labels.shape)}, not {self.labels} for each sample at axis {self.label_dim}: give "
                "0 or 1 for each label, and not the numbers of those that hold."
            )
        return labels

    def valid(self, batch: Any) -> Tensor:
        """Of the labels' shape: the label is neither NaN nor ``ignore_index``."""
        return valid_labels(self.targets(batch), self.ignore_index)

    def output(self, raw: Any) -> Tensor:
        """Logits: the tensor itself, or ``logits`` of a mapping or of a transformers output."""
        return logits_of(raw)

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean over labels that count; [B, L] -> scalar."""
        weight = self.pos_weight
        if weight is not None and weight.ndim and self.label_dim == 1:
            weight = weight.view(-1, *[1] * (output.ndim - 2))
        return binary_cross_entropy(output, self.targets(batch), self.label_smoothing, self.ignore_index, weight)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """``f1``, ``f1_macro``, ``average_precision`` and ``accuracy`` in [0, 1], ``nll`` in nats a label."""
        plain = not self.label_smoothing and self.pos_weight is None
        form = {"labels": self.labels, "label_dim": self.label_dim, "ignore_index": self.ignore_index}
        return MetricCollection(
            {
                "f1": F1(ignore_index=self.ignore_index),
                "f1_macro": F1("macro", **form),
                "average_precision": average_precision(**form),
                "accuracy": LabelAccuracy(self.ignore_index),
                "nll": LabelNLL(self.ignore_index, of_loss=plain),
            },
            compute_groups=False,
            prefix=prefix,
        )
