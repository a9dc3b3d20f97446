"""What the outputs of a network are: the one place that tasks, distillation modules, callbacks and trainers ask."""

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from workbench.models.positions import IGNORED

Kind = Literal["classes", "labels", "numbers", "embedding"]

_OF_PROBLEM: dict[str, Kind] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "numbers",
}


@dataclass(frozen=True)
class OutputType:
    """What a network's outputs are.

    ========== =============================================================== ======================= ===============
    kind       outputs                                                         in scored form          valid positions
    ========== =============================================================== ======================= ===============
    classes    logits of which one class is right, softmax along ``class_dim`` [..., classes]          [...]
    labels     logits of independent yes-or-no labels, a sigmoid each; one     the labels' own shape   the same shape
               logit is a binary classifier
    numbers    a regression's                                                  the targets' own shape  the same shape
    embedding  vectors of which the direction counts                           [B, D]                  [B]
    ========== =============================================================== ======================= ===============

    Args:
        kind: classes, labels, numbers or embedding.
        class_dim: The axis of the classes in what the network returns: -1 as transformers have it, 1 as torch's
            cross-entropy for dense prediction, [B, C, H, W] and [B, C, T]. Only for classes.

    Raises:
        ValueError: If the kind is none of these, or an axis is given where there are no classes.
    """

    kind: Kind
    class_dim: int = -1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"outputs are {self.kind!r}: choose from {', '.join(get_args(Kind))}")
        if self.class_dim != -1 and self.kind != "classes":
            raise ValueError(f"class_dim is {self.class_dim}, and {self.kind} have no classes: leave it out")

    def scored(self, logits: Tensor) -> Tensor:
        """What the network returned, in the form in which it is scored: the classes last."""
        if self.kind != "classes" or self.class_dim in (-1, logits.ndim - 1):
            return logits
        if not -logits.ndim <= self.class_dim < logits.ndim:
            raise ValueError(f"class_dim is {self.class_dim} and the outputs are {list(logits.shape)}: no such axis")
        return logits.movedim(self.class_dim, -1)

    @property
    def elementwise(self) -> bool:
        """Whether every number of an output counts by itself, as labels and numbers do."""
        return self.kind in ("labels", "numbers")

    def positions(
        self, scored: Tensor, labels: Tensor | None = None, ignore_index: int | None = IGNORED
    ) -> tuple[Tensor, Tensor | None]:
        """Valid positions of scored outputs, and the labels there.

        Labels of images at another resolution than the outputs, as Segformer has them, are brought to that of the
        outputs: each output takes the label nearest to its centre. Where labels are class probabilities, or outputs are
        embeddings, every position is valid.

        Args:
            scored: Outputs in scored form.
            labels: The batch's labels, with neighbouring axes flattened, in them or in the outputs, or with axes of
                size 1 more or less; None if there are none.
            ignore_index: Label of positions that do not count, except among numbers; None if there is none.

        Returns:
            Bool, of the shape in the table above: the label is none of ``ignore_index`` and not NaN; and the labels in
            that shape, None where there are none.

        Raises:
            ValueError: If the labels' shape does not fit.
        """
        shape = scored.shape if self.elementwise else scored.shape[:-1]
        probabilities = labels is not None and self.kind == "classes" and labels.is_floating_point()
        if labels is None or probabilities or self.kind == "embedding":
            return torch.ones(shape, dtype=torch.bool, device=scored.device), None
        if (fitted := _fitted(labels, shape)) is None:
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)} and the outputs, which are {self.kind}, "
                f"{list(scored.shape)} in scored form: labels {list(shape)} are needed; DistillationCallback "
                "takes them by labels=lambda batch: ..."
            )
        valid = _counts(fitted, None if self.kind == "numbers" else ignore_index)
        return valid.to(scored.device), fitted.long() if self.kind == "classes" else fitted


def output_type(outputs: OutputType | Kind) -> OutputType:
    """What an argument ``outputs`` says: a type, or its kind alone."""
    return outputs if isinstance(outputs, OutputType) else OutputType(outputs)


def of_problem(config: Any) -> OutputType | None:
    """The outputs of a transformers model, by its ``config.problem_type``; None where the configuration has none."""
    kind = _OF_PROBLEM.get(str(getattr(config, "problem_type", None)))
    return None if kind is None else OutputType(kind)


def infer(
    logits: Tensor, labels: Tensor | None = None, config: Any = None, ignore_index: int | None = IGNORED
) -> OutputType:
    """What outputs are, from a first batch: by ``config.problem_type``, else by the labels' shape and dtype.

    A transformers model that was given labels has set ``problem_type`` itself: to regression with ``num_labels=1``.

    ============================================== ====================== ==========================================
    labels                                         logits                 outputs
    ============================================== ====================== ==========================================
    integers [B], [B, L]; flattened, or with axes  [B, C], [B, L, C]      classes along the last axis
    of size 1, as the other may be
    integers [B, T], [B, H, W]                     [B, C, T], [B, C, H,   classes along axis 1, also where images of
                                                   W]                     labels are larger
    0 or 1, one logit for each, integers or bool   the same shape, or an  labels
                                                   axis of size 1 more
    0 or 1, rows not all of one 1                  the same shape         labels
    other floats, not all in [0, 1], and not just  the same shape, or an  numbers
    -1, 0 and 1                                    axis of size 1 more
    none                                           [B, C], [B, L, C] of   classes along the last axis
                                                   transformers
    none                                           [B, C] of another      classes, with a warning
                                                   network, C > 1
    ============================================== ====================== ==========================================

    Args:
        logits: What the network returned.
        labels: The labels of its batch.
        config: The configuration of a transformers model; None for any other network.
        ignore_index: Label of positions that do not count; None if there is none.

    Raises:
        ValueError: Everything else, such as rows that are one-hot or independent labels, or axes of equal size.
    """
    if (known := of_problem(config)) is not None:
        return known
    transformers = hasattr(config, "model_type")
    if labels is None:
        if transformers and logits.ndim in (2, 3) and logits.shape[-1] > 1:
            return OutputType("classes")
        if not transformers and logits.ndim == 2 and logits.shape[-1] > 1:
            warnings.warn(
                f"the outputs {list(logits.shape)} come without labels and are taken for logits of classes: say it by "
                "the argument outputs, 'classes', or else 'labels', 'numbers' or 'embedding'",
                stacklevel=2,
            )
            return OutputType("classes")
        raise _question(logits, labels, "without labels it cannot be told what they are")
    same = _fitted(labels, logits.shape, resolution=False) is not None
    if same or labels.is_floating_point():
        return _of_same_shape(logits, labels, same, ignore_index)
    axes = [
        axis
        for axis in sorted({1, logits.ndim - 1})
        if logits.ndim > max(axis, 1) and labels.dtype != torch.bool and _nested(labels.shape, _without(logits, axis))
    ]
    if len(axes) == 2 and transformers:
        axes = axes[1:]
    if not axes and logits.ndim > 3 and labels.ndim == logits.ndim - 1:
        spatial = _fitted(labels, (len(logits), *logits.shape[2:])) is not None
        axes = [1] if spatial and _scales_alike(labels.shape[1:], logits.shape[2:]) else []
    if len(axes) == 1 and logits.shape[axes[0]] > 1:
        return OutputType("classes", -1 if axes[0] == logits.ndim - 1 else axes[0])
    raise _question(logits, labels, "classes may stand along several axes" if axes else "the shapes do not go together")


def _of_same_shape(logits: Tensor, labels: Tensor, same: bool, ignore_index: int | None) -> OutputType:
    counts = _counts(labels, ignore_index)
    values = labels[counts]
    floats = labels.is_floating_point()
    if not same:
        raise _question(logits, labels, "the shapes do not go together")
    binary = bool(((values == 0) | (values == 1)).all())
    if not floats and not binary:
        raise _question(logits, labels, "integers of the outputs' own shape are labels only if each is 0 or 1")
    if bool(((values < 0) | (values > 1)).any()):
        if bool(((values == -1) | (values == 0) | (values == 1)).all()):
            why = "floats of -1, 0 and 1 are numbers, or labels of which -1 does not count (ignore_index=-1)"
            raise _question(logits, labels, why)
        return OutputType("numbers")
    single = labels.numel() == len(labels) or (labels.ndim > 1 and logits.shape[1:2] == (1,))
    if binary and not single:
        ones, known = ((labels == 1) & counts).reshape(logits.shape), counts.reshape(logits.shape)
        if not any(_one_hot(ones, known, axis) for axis in {1, logits.ndim - 1} if axis < logits.ndim):
            return OutputType("labels")
        raise _question(logits, labels, "rows of 0 and 1 that sum to 1 are one class each or independent labels")
    if not floats:
        return OutputType("labels")
    raise _question(logits, labels, "floats between 0 and 1 are labels, probabilities or numbers")


def _one_hot(ones: Tensor, known: Tensor, axis: int) -> bool:
    """Whether each row has exactly one 1; one of which only a part is known is no class, and one without any may be."""
    return bool(((ones.sum(axis) == 1) & known.all(axis) | ~known.any(axis)).all())


def _counts(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Bool, of the labels' shape: which are neither ``ignore_index`` nor NaN."""
    if labels.dtype == torch.bool:
        return torch.ones_like(labels)
    # Bytes would take -100 for 156.
    labels = labels if labels.is_floating_point() else labels.long()
    return ~labels.isnan() if ignore_index is None else ~labels.isnan() & (labels != ignore_index)


def _without(tensor: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(size for index, size in enumerate(tensor.shape) if index != axis)


def _scales_alike(labels: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether images of labels are larger than those of outputs by one factor, up to a rounding of the sizes."""
    factor = max(round(large / small) for large, small in zip(labels, outputs))
    return factor >= 1 and all(large // factor <= small <= -(-large // factor) for large, small in zip(labels, outputs))


def _fitted(labels: Tensor, shape: Sequence[int], resolution: bool = True) -> Tensor | None:
    """Labels in this shape; None if they do not fit."""
    if labels.shape == tuple(shape):
        return labels
    if _nested(labels.shape, shape):
        return labels.reshape(shape)
    if not resolution or labels.ndim != len(shape) or labels.ndim < 3 or len(labels) != shape[0]:
        return None
    for axis, (old, new) in enumerate(zip(labels.shape, shape)):
        if old != new:
            # The nearest pixel to the centre of each output's, as torch's nearest-exact.
            # In integers: floats would round, and MPS has no wide ones.
            centres = (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
            labels = labels.index_select(axis, centres)
    return labels


def _nested(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one shape is the other with neighbouring axes flattened, or with axes of size 1 more or less."""
    strides, others = ({1, *accumulate(shape, operator.mul)} for shape in (one, other))
    return math.prod(one) == math.prod(other) and (strides <= others or others <= strides)


def _question(logits: Tensor, labels: Tensor | None, why: str) -> ValueError:
    given = "no labels" if labels is None else f"labels {labels.dtype} {list(labels.shape)}"
    return ValueError(
        f"the outputs are {list(logits.shape)} with {given}: {why}. Say it by the argument outputs: 'classes' (softmax "
        "along the last axis; OutputType('classes', class_dim=1) along axis 1), 'labels' (a sigmoid each, binary or "
        "multi-label), 'numbers' (regression) or 'embedding'. Where these are not the labels of the outputs, "
        "DistillationCallback takes them by labels=lambda batch: ..."
    )
