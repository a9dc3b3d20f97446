"""Semantic segmentation: a class for each pixel, frame or voxel."""

import math
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from workbench.models.forward import inputs_of
from workbench.tasks.base import Resized, Weighted, class_labels_of, logits_of
from workbench.tasks.metrics import (
    NLL,
    Accuracy,
    check_class_weights,
    check_label_smoothing,
    cross_entropy,
    valid_mask,
    weight_sum,
)
from workbench.tasks.outputs import OutputType

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@final
class Segmentation(Weighted, Resized):
    """A class for each pixel: labels [B, H, W], logits [B, C, H, W]; also [B, C, T] and [B, C, D, H, W].

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries the model
    gets by keyword. Labels are integers. A network returns its logits, or a mapping or an output of transformers that
    has them as ``logits``, or as ``out`` as torchvision does. Logits of another resolution than the labels', such as
    Segformer's at a quarter, are brought to it bilinearly for loss, metrics and distillation, as transformers does.

    Metrics, over all pixels of a split: ``mean_iou``, ``accuracy`` of pixels, ``nll`` in nats a pixel.

    Args:
        classes: C.
        label_smoothing: Weight of the uniform distribution in the loss, in [0, 1); see `cross_entropy`.
        ignore_index: Label of pixels that count neither in the loss nor in the metrics, 255 in many data sets; by
            default every pixel counts and such a label is an error.
        class_weights: Weight of each class in the loss, C numbers of at least 0. The loss is then the weighted mean of
            `torch.nn.CrossEntropyLoss`; the metrics have no weights.

    Raises:
        ValueError: An argument out of range; later, a batch or an output of another form.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        classes: int,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes}: give at least 2; one logit a pixel is for Binary.")
        check_label_smoothing(label_smoothing)
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", check_class_weights(class_weights, classes), persistent=False)

    @property
    def outputs(self) -> OutputType:
        """Classes, along axis 1 of what the network returns."""
        return OutputType("classes", 1)

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Mean intersection over union, the higher the better."""
        return "mean_iou", "max"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but label, labels and label_ids) of a mapping."""
        self.targets(batch)
        return inputs_of(batch)

    def targets(self, batch: Any) -> Tensor:
        """Labels, int64 [B, H, W]."""
        return class_labels_of(batch)

    def valid(self, batch: Any) -> Tensor:
        """[B, H, W]: the label is not ``ignore_index``."""
        return valid_mask(self.targets(batch), self.ignore_index)

    def weight(self, batch: Any) -> Tensor:
        """Number of valid pixels, or the sum of the weights of their classes."""
        return weight_sum(self.targets(batch), self.class_weights, self.ignore_index)

    def output(self, raw: Any) -> Tensor:
        """Logits with the classes last, [B, h, w, C]: of the tensor itself, of ``logits`` or of ``out``."""
        logits = logits_of(raw)
        if not 3 <= logits.ndim <= 5 or logits.shape[1] != self.classes:
            raise ValueError(
                f"logits are {list(logits.shape)}: give [B, {self.classes}, H, W], the classes at axis 1, for "
                f"classes={self.classes}."
            )
        return self.outputs.scored(logits)

    def resized(self, output: Tensor, batch: Any) -> Tensor:
        """Logits at the labels' resolution, [B, H, W, C]."""
        return resize_logits(output, self.targets(batch))

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean `cross_entropy` over valid pixels, weighted by ``class_weights``; [B, h, w, C] -> scalar."""
        labels = self.targets(batch)
        output = resize_logits(output, labels)
        return cross_entropy(output, labels, self.label_smoothing, self.ignore_index, self.class_weights)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """``mean_iou`` and ``accuracy`` in [0, 1], ``nll`` in nats, each over all valid pixels of a split."""
        plain = not self.label_smoothing and self.class_weights is None
        return MetricCollection(
            {
                "mean_iou": MeanIoU(self.classes, self.ignore_index),
                "accuracy": Accuracy(self.ignore_index, resize_logits),
                "nll": NLL(self.ignore_index, resize_logits, of_loss=plain),
            },
            compute_groups=False,
            prefix=prefix,
        )


def resize_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, h, w, C] at the resolution of targets [B, H, W], interpolated bilinearly; as they are if it is theirs.

    Raises:
        ValueError: If the targets are not one a position of as many axes.
    """
    if logits.shape[:-1] == targets.shape:
        return logits
    if logits.ndim != targets.ndim + 1 or len(logits) != len(targets) or targets.ndim - 1 not in _MODES:
        raise ValueError(
            f"logits are {list(logits.shape)}, the classes last, for labels {list(targets.shape)}: give one class "
            "number for each position, [B, H, W], without an axis of channels."
        )
    mode = _MODES[targets.ndim - 1]
    resized = F.interpolate(logits.movedim(-1, 1), size=targets.shape[1:], mode=mode, align_corners=False)
    return resized.movedim(1, -1)


@final
class MeanIoU(Metric):
    """Mean over classes of intersection over union, tp / (tp + fp + fn), counted over a whole split; in [0, 1].

    A class that is neither in the targets nor predicted is left out, as is a class that is ``ignore_index``; NaN over
    none. A mean over images or batches is another number, which depends on how they are put together. Logits [..., C]
    at the targets' resolution or another, targets [...].

    Args:
        classes: C.
        ignore_index: The target of positions that do not count.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.ignore_index = ignore_index
        # Rows: right, predicted, in the targets.
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        valid = valid_mask(targets, self.ignore_index)
        predicted = resize_logits(logits, targets).argmax(-1)[valid]
        labels = targets[valid]
        rows = [predicted[predicted == labels], predicted, labels]
        self.counts = self.counts + torch.stack([torch.bincount(row, minlength=self.classes) for row in rows])

    def compute(self) -> Tensor:
        """The mean so far."""
        right, predicted, labels = self.counts
        union = predicted + labels - right
        gone = union == 0
        if self.ignore_index is not None and 0 <= self.ignore_index < self.classes:
            gone[self.ignore_index] = True
        return (right / union.clamp(min=1)).masked_fill(gone, math.nan).nanmean()
