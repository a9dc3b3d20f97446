"""Classification of samples or of positions."""

from typing import Any, Literal, final

from torch import Tensor
from torchmetrics import MetricCollection

from workbench.models.forward import inputs_of
from workbench.tasks.base import Weighted, class_labels_of, logits_of
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


@final
class Classification(Weighted):
    """One class out of several for each sample, logits [B, C], or for each position, logits [B, L, C].

    A batch is a tuple (x, y), more inputs coming before y, or a mapping with ``labels``, whose other entries
    the model gets by keyword. Labels are integers, [B] or [B, L].

    Args:
        classes: C.
        label_smoothing: Weight of the uniform distribution in the loss, in [0, 1); see `cross_entropy`.
        ignore_index: Label of positions that count neither in the loss nor in the metrics, such as padding
            (-100 by the habit of transformers); by default every position counts and such a label is an
            error.
        class_weights: Weight of each class in the loss, C numbers of at least 0. The loss is then the weighted mean of
            `torch.nn.CrossEntropyLoss`; the metrics have no weights.
        class_dim: The axis of the classes in what the network returns: -1, or 1 for frames [B, C, L].

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
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes}: give at least 2.")
        check_label_smoothing(label_smoothing)
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", check_class_weights(class_weights, classes), persistent=False)
        self.class_dim = class_dim

    @property
    def outputs(self) -> OutputType:
        """Classes, along ``class_dim``."""
        return OutputType("classes", self.class_dim)

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Accuracy, the higher the better."""
        return "accuracy", "max"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """((x,), {}) of a tuple (x, y), ((), everything but label, labels and label_ids) of a mapping."""
        self.targets(batch)
        return inputs_of(batch)

    def targets(self, batch: Any) -> Tensor:
        """Labels, int64 [B] or [B, L]."""
        return class_labels_of(batch)

    def valid(self, batch: Any) -> Tensor:
        """[B] or [B, L]: the label is not ``ignore_index``."""
        return valid_mask(self.targets(batch), self.ignore_index)

    def weight(self, batch: Any) -> Tensor:
        """Number of valid positions, or the sum of the weights of their classes."""
        return weight_sum(self.targets(batch), self.class_weights, self.ignore_index)

    def output(self, raw: Any) -> Tensor:
        """Logits, classes last: the tensor itself, or ``logits`` of a mapping or of a transformers output."""
        return self.outputs.scored(logits_of(raw))

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean `cross_entropy` over valid positions, weighted by ``class_weights``; [B, C] or [B, L, C] -> scalar."""
        labels = self.targets(batch)
        if output.shape != (*labels.shape, self.classes):
            raise ValueError(
                f"logits are {list(output.shape)} for labels {list(labels.shape)}, expected "
                f"{[*labels.shape, self.classes]}: fit the model's output to classes={self.classes}."
            )
        return cross_entropy(output, labels, self.label_smoothing, self.ignore_index, self.class_weights)

    def metrics(self, prefix: str = "") -> MetricCollection:
        """Accuracy in [0, 1] and nll in nats, each over all valid positions seen, however batched."""
        plain = not self.label_smoothing and self.class_weights is None
        return MetricCollection(
            {"accuracy": Accuracy(self.ignore_index), "nll": NLL(self.ignore_index, of_loss=plain)},
            compute_groups=False,
            prefix=prefix,
        )
