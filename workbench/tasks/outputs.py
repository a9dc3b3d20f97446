"""What the outputs of a network are: the one place that tasks, distillation modules, callbacks and trainers ask."""

from collections.abc import Sequence
from dataclasses import dataclass
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
            labels: The batch's labels, flattened or with axes of size 1 more or less; None if there are none.
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
                f"{list(scored.shape)} in scored form: labels {list(shape)} are needed"
            )
        valid = ~fitted.isnan() if fitted.is_floating_point() else torch.ones_like(fitted, dtype=torch.bool)
        if self.kind != "numbers" and ignore_index is not None and fitted.dtype != torch.bool:
            valid &= fitted != ignore_index
        return valid.to(scored.device), fitted.long() if self.kind == "classes" else fitted


def output_type(outputs: OutputType | Kind) -> OutputType:
    """What an argument ``outputs`` says: a type, or its kind alone."""
    return outputs if isinstance(outputs, OutputType) else OutputType(outputs)


def of_problem(config: Any) -> OutputType | None:
    """The outputs of a transformers model, by its ``config.problem_type``; None where the configuration has none."""
    kind = _OF_PROBLEM.get(str(getattr(config, "problem_type", None)))
    return None if kind is None else OutputType(kind)


def infer(logits: Tensor, labels: Tensor | None = None, config: Any = None, ignore_index: int = IGNORED) -> OutputType:
    """What outputs are, from a first batch: by ``config.problem_type``, else by the labels' shape and dtype.

    A transformers model that was given labels has set ``problem_type`` itself: to regression with ``num_labels=1``.

    ============================================== ====================== ==========================================
    labels                                         logits                 outputs
    ============================================== ====================== ==========================================
    integers [B], [B, L]                           [B, C], [B, L, C]      classes along the last axis
    integers [B, T], [B, H, W]                     [B, C, T], [B, C, H,   classes along axis 1, also where images of
                                                   W]                     labels are larger
    0 or 1, integers or bool                       the same shape, or one labels
                                                   logit more
    0 or 1, floats, rows not all of sum 1          the same shape         labels
    other floats, not all in [0, 1]                the same shape, or one numbers
                                                   logit more
    none                                           [B, C], [B, L, C] of   classes along the last axis
                                                   transformers
    ============================================== ====================== ==========================================

    Args:
        logits: What the network returned.
        labels: The labels of its batch.
        config: The configuration of a transformers model; None for any other network.
        ignore_index: Label of positions that do not count.

    Raises:
        ValueError: Everything else, such as floats that are one-hot or independent labels, or axes of equal size.
    """
    if (known := of_problem(config)) is not None:
        return known
    transformers = hasattr(config, "model_type")
    if labels is None:
        if transformers and logits.ndim in (2, 3) and logits.shape[-1] > 1:
            return OutputType("classes")
        raise _question(logits, labels, "without labels it cannot be told what they are")
    same = _fitted(labels, logits.shape, resolution=False) is not None
    if labels.is_floating_point():
        return _of_floats(logits, labels, same)
    if same:
        values = labels if labels.dtype == torch.bool else labels[labels != ignore_index]
        if bool(((values == 0) | (values == 1)).all()):
            return OutputType("labels")
        raise _question(logits, labels, "integers of the outputs' own shape are labels only if each is 0 or 1")
    axes = [
        axis
        for axis in sorted({1, logits.ndim - 1})
        if logits.ndim > max(axis, 1) and labels.dtype != torch.bool and _without(logits, axis) == tuple(labels.shape)
    ]
    if len(axes) == 2 and transformers:
        axes = axes[1:]
    if not axes and logits.ndim > 3 and labels.ndim == logits.ndim - 1:
        spatial = _fitted(labels, (len(logits), *logits.shape[2:])) is not None
        axes = [1] if spatial and _scales_alike(labels.shape[1:], logits.shape[2:]) else []
    if len(axes) == 1 and logits.shape[axes[0]] > 1:
        return OutputType("classes", -1 if axes[0] == logits.ndim - 1 else axes[0])
    raise _question(logits, labels, "classes may stand along several axes" if axes else "the shapes do not go together")


def _of_floats(logits: Tensor, labels: Tensor, same: bool) -> OutputType:
    values = labels[~labels.isnan()]
    single = labels.numel() == len(labels) or (labels.ndim > 1 and logits.shape[1:2] == (1,))
    if not same:
        raise _question(logits, labels, "the shapes do not go together")
    if bool(((values < 0) | (values > 1)).any()):
        return OutputType("numbers")
    binary = bool(((values == 0) | (values == 1)).all())
    if binary and not single:
        rows = [labels.nansum(axis) for axis in {1, labels.ndim - 1}]
        if not any(bool((row == 1).all()) for row in rows):
            return OutputType("labels")
        raise _question(logits, labels, "rows of 0 and 1 that sum to 1 are one class each or independent labels")
    raise _question(logits, labels, "floats between 0 and 1 are labels, probabilities or numbers")


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
    flat = labels.ndim == 1 and labels.numel() == torch.Size(shape).numel()
    if flat or [size for size in labels.shape if size != 1] == [size for size in shape if size != 1]:
        return labels.reshape(shape)
    if not resolution or labels.ndim != len(shape) or labels.ndim < 3 or len(labels) != shape[0]:
        return None
    for axis, (old, new) in enumerate(zip(labels.shape, shape)):
        if old != new:
            # The nearest pixel to the centre of each output's, as torch's nearest-exact.
            centres = (torch.arange(new, device=labels.device, dtype=torch.float64) + 0.5) * (old / new)
            labels = labels.index_select(axis, centres.long().clamp(max=old - 1))
    return labels


def _question(logits: Tensor, labels: Tensor | None, why: str) -> ValueError:
    given = "no labels" if labels is None else f"labels {labels.dtype} {list(labels.shape)}"
    return ValueError(
        f"the outputs are {list(logits.shape)} with {given}: {why}. Say it by the argument outputs: 'classes' (softmax "
        "along the last axis; OutputType('classes', class_dim=1) along axis 1), 'labels' (a sigmoid each, binary or "
        "multi-label), 'numbers' (regression) or 'embedding'"
    )
