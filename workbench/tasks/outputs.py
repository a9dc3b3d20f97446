"""What the outputs of a network are: the one place that tasks, distillation modules, callbacks and trainers ask."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

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


def of_problem(config: Any) -> OutputType | None:
    """The outputs of a transformers model, by its ``config.problem_type``; None where the configuration has none."""
    kind = _OF_PROBLEM.get(str(getattr(config, "problem_type", None)))
    return None if kind is None else OutputType(kind)
