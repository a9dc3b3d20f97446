"""The losses on labels and numbers, and on embeddings, as modules."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from distill.losses.elementwise import (
    attentive_imitation,
    bernoulli_target,
    check_scale,
    check_spread,
    squared_error,
    teacher_bounded,
)
from distill.losses.features import cosine
from distill.losses.modules import LogitLoss, needed_labels
from distill.losses.reduction import check_temperature, check_weights


@final
class BernoulliTarget(LogitLoss):
    """:func:`distill.losses.bernoulli_target` as a module.

    Args:
        temperature: T > 0.
    """

    kinds = frozenset({"labels"})

    def __init__(self, temperature: float = 4.0) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature = temperature

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        return bernoulli_target(student, teacher, self.temperature, valid)


@final
class SquaredError(LogitLoss):
    """:func:`distill.losses.squared_error` as a module.

    Args:
        scale: What the outputs are divided by, above 0: one number, or one for each entry of the last axis.
    """

    kinds = frozenset({"numbers"})

    def __init__(self, scale: float | Sequence[float] = 1.0) -> None:
        check_scale(scale)
        super().__init__()
        self.scale = scale if isinstance(scale, float | int) else tuple(scale)

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        return squared_error(student, teacher, valid, scale=self.scale)


@final
class TeacherBounded(LogitLoss):
    """:func:`distill.losses.teacher_bounded` as a module.

    Args:
        margin: By how much the student's squared error must be below the teacher's to count no more, at least 0.
    """

    kinds = frozenset({"numbers"})
    needs_labels = True

    def __init__(self, margin: float = 0.0) -> None:
        check_weights(margin=margin)
        super().__init__()
        self.margin = margin

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are needed."""
        return teacher_bounded(student, teacher, valid, labels=needed_labels(self, labels), margin=self.margin)


@final
class AttentiveImitation(LogitLoss):
    """:func:`distill.losses.attentive_imitation` as a module.

    Args:
        spread: The range of the teacher's squared errors over the training set, above 0.
    """

    kinds = frozenset({"numbers"})
    needs_labels = True

    def __init__(self, spread: float) -> None:
        check_spread(spread)
        super().__init__()
        self.spread = spread

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are needed."""
        return attentive_imitation(student, teacher, valid, labels=needed_labels(self, labels), spread=self.spread)


@final
class EmbeddingCosine(LogitLoss):
    """:func:`distill.losses.cosine` of a network's outputs, embeddings of equal width, as a module."""

    kinds = frozenset({"embedding"})

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        return cosine(student, teacher, valid)
