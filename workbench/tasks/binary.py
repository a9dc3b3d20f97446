"""Binary classification: one yes or no for each sample, or for each position."""

from typing import Any, Literal, final

from torch import Tensor
from torchmetrics import MetricCollection

from workbench.models.forward import inputs_of
from workbench.tasks.base import Task, labels_of, logits_of
from workbench.tasks.labels import (
    F1,
    LabelAccuracy,
    LabelNLL,
    auroc,
    binary_cross_entropy,
    check_pos_weight,
    valid_labels,
)
from workbench.tasks.metrics import check_label_smoothing
from workbench.tasks.outputs import OutputType


@final
class Binary(Task):
    """A yes or no for each sample, one logit [B] or [B, 1], or for each position, [B, L], [B, L, 1] or [B, 1, H, W].

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries the model
    gets by keyword. Labels are 0 or 1, integer, bool or floating point, or the probability of a 1; one that is NaN
    counts neither in the loss nor in the metrics. Axes of size 1, but for the batch's, are dropped from logits and
    labels. A network with two logits is one for `Classification`.

    Loss: :func:`~workbench.tasks.labels.binary_cross_entropy`. Metrics, over all labels of a split together:
    ``accuracy`` and ``f1`` at a probability of .5, ``auroc``, NaN where all labels are the same, and ``nll`` in nats.
    ``auroc`` keeps all logits of a split.

    Args:
        pos_weight: Weight of the yeses in the loss, above 0, as in `torch.nn.BCEWithLogitsLoss`; the metrics have none.
        label_smoothing: s in [0, 1): labels go to (1 - s) y + s / 2 in the loss.
        ignore_index: Label of what counts neither in the loss nor in the metrics, such as -100; by default an error.

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    pos_weight: Tensor | None

    def __init__(
        self, pos_weight: float | None = None, label_smoothing: float = 0.0, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        check_label_smoothing(label_smoothing)
        self.register_buffer("pos_weight", check_pos_weight(pos_weight), persistent=False)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    @property
    def outputs(self) -> OutputType:
        """Labels, one for each sample or position."""
        return OutputType("labels")

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Accuracy, the higher the better."""
        return "accuracy", "max"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but label, labels and label_ids) of a mapping."""
        self.targets(batch)
        return inputs_of(batch)

    def targets(self, batch: Any) -> Tensor:
        """Labels, [B] or [B, L]."""
        labels = labels_of(batch)
        if labels.is_complex():
            raise ValueError(f"labels are {labels.dtype}: give 0 and 1.")
        return _without_ones(labels)

    def valid(self, batch: Any) -> Tensor:
        """[B] or [B, L]: the label is neither NaN nor ``ignore_index``."""
        return valid_labels(self.targets(batch), self.ignore_index)

    def output(self, raw: Any) -> Tensor:
        """Logits [B] or [B, L]: the tensor itself, or ``logits`` of a mapping or of a transformers output."""
        return _without_ones(logits_of(raw))

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean over labels that count; [B] or [B, L] -> scalar."""
        labels = self.targets(batch)
        if output.shape != labels.shape:
            raise ValueError(
                f"logits are {list(output.shape)} for labels {list(labels.shape)}: give the network one output for "
                "each label; one with two outputs is for Classification(2)."
            )
        return binary_cross_entropy(output, labels, self.label_smoothing, self.ignore_index, self.pos_weight)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """``accuracy``, ``f1`` and ``auroc`` in [0, 1], ``nll`` in nats, each over all labels that count."""
        plain = not self.label_smoothing and self.pos_weight is None
        return MetricCollection(
            {
                "accuracy": LabelAccuracy(self.ignore_index),
                "f1": F1(ignore_index=self.ignore_index),
                "auroc": auroc(self.ignore_index),
                "nll": LabelNLL(self.ignore_index, of_loss=plain),
            },
            compute_groups=False,
            prefix=prefix,
        )


def _without_ones(values: Tensor) -> Tensor:
    """Without axes of size 1, but for the batch's: [B, 1] and [B] would be broadcast to [B, B]."""
    return values.reshape(values.shape[:1] + tuple(size for size in values.shape[1:] if size != 1))
