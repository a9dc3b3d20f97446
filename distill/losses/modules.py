"""The losses as modules: numbers are set and checked once, ``forward`` is the same for all and calls the function."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from distill.losses.controls import label_smoothing, shuffled_off_class
from distill.losses.features import (
    attention_relation,
    attention_transfer,
    check_heads,
    check_relations,
    cosine,
    hint,
    rkd,
    similarity_preserving,
)
from distill.losses.logits import dist, dkd, jsd, logit_mse, reverse_kl, soft_target, standardize
from distill.losses.reduction import (
    check_beta,
    check_class_weights,
    check_logits,
    check_smoothing,
    check_temperature,
    check_weights,
)


class LogitLoss(nn.Module, ABC):
    """A loss on a network's outputs; a scalar, the mean over valid positions.

    Attributes:
        kinds: What outputs it compares, see :class:`workbench.tasks.OutputType`: classes, labels, numbers, embedding.
            Those with classes among them get labels and numbers as [..., 1].
        needs_labels: Whether it needs hard labels.
        needs_teacher: Whether it needs the teacher; other losses take any tensor in its place.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"classes"})
    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    @abstractmethod
    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of outputs in scored form, with ``valid`` and ``labels`` of the shape of their valid positions.

        Logits [..., classes], ``valid`` bool [...] and ``labels`` int64 [...]; of labels and numbers all of one shape.
        """

    def extra_repr(self) -> str:
        """The loss's numbers."""
        return _numbers(self)


class FeatureLoss(nn.Module, ABC):
    """A loss on features; a scalar.

    Attributes:
        projects: Whether the student's features must first be projected to the teacher's width: the last axis, of 4-D
            images the channels.
    """

    projects: ClassVar[bool]

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss of features [B, ...], ``valid`` bool over leading axes."""

    def extra_repr(self) -> str:
        """The loss's numbers."""
        return _numbers(self)


@final
class SoftTarget(LogitLoss):
    """:func:`distill.losses.soft_target` as a module.

    Args:
        temperature: T > 0.
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
        class_weights: Weight of each class, see :func:`distill.losses.soft_target`; equal if None.
    """

    def __init__(
        self, temperature: float = 4.0, standardize: bool = False, class_weights: Sequence[float] | None = None
    ) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature, self.standardize = temperature, standardize
        self.class_weights = check_class_weights(class_weights)

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        student, teacher = _standardized(self, student, teacher, valid)
        return soft_target(student, teacher, self.temperature, valid, class_weights=self.class_weights)


@final
class ReverseKL(LogitLoss):
    """:func:`distill.losses.reverse_kl` as a module.

    Args:
        temperature: T > 0.
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
        class_weights: Weight of each class, see :func:`distill.losses.soft_target`; equal if None.
    """

    def __init__(
        self, temperature: float = 1.0, standardize: bool = False, class_weights: Sequence[float] | None = None
    ) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature, self.standardize = temperature, standardize
        self.class_weights = check_class_weights(class_weights)

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        student, teacher = _standardized(self, student, teacher, valid)
        return reverse_kl(student, teacher, self.temperature, valid, class_weights=self.class_weights)


@final
class JSD(LogitLoss):
    """:func:`distill.losses.jsd` as a module.

    Args:
        temperature: T > 0.
        beta: Weight of the teacher in the mixture, in [0, 1].
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
        class_weights: Weight of each class, see :func:`distill.losses.soft_target`; equal if None.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        beta: float = 0.5,
        standardize: bool = False,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        check_temperature(temperature)
        check_beta(beta)
        super().__init__()
        self.temperature, self.beta, self.standardize = temperature, beta, standardize
        self.class_weights = check_class_weights(class_weights)

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        student, teacher = _standardized(self, student, teacher, valid)
        return jsd(student, teacher, self.temperature, valid, beta=self.beta, class_weights=self.class_weights)


@final
class LogitMSE(LogitLoss):
    """:func:`distill.losses.logit_mse` as a module.

    Args:
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`; only for classes.
    """

    kinds = frozenset({"classes", "labels", "numbers", "embedding"})

    def __init__(self, standardize: bool = False) -> None:
        super().__init__()
        self.standardize = standardize

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        student, teacher = _standardized(self, student, teacher, valid)
        return logit_mse(student, teacher, valid)


@final
class DKD(LogitLoss):
    """:func:`distill.losses.dkd` as a module.

    Args:
        temperature: T > 0.
        alpha: Weight of the labelled class against the rest, at least 0.
        beta: Weight of the rest among themselves, at least 0.
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
        class_weights: Weight of each class, see :func:`distill.losses.soft_target`; equal if None.
    """

    needs_labels = True

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        standardize: bool = False,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        check_temperature(temperature)
        check_weights(alpha=alpha, beta=beta)
        super().__init__()
        self.temperature, self.alpha, self.beta, self.standardize = temperature, alpha, beta, standardize
        self.class_weights = check_class_weights(class_weights)

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are needed."""
        student, teacher = _standardized(self, student, teacher, valid)
        return dkd(
            student,
            teacher,
            self.temperature,
            valid,
            labels=needed_labels(self, labels),
            alpha=self.alpha,
            beta=self.beta,
            class_weights=self.class_weights,
        )


@final
class DIST(LogitLoss):
    """:func:`distill.losses.dist` as a module.

    Args:
        temperature: T > 0.
        inter: Weight of the relations between classes, at least 0.
        intra: Weight of the relations within a class, at least 0.
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
    """

    def __init__(
        self, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0, standardize: bool = False
    ) -> None:
        check_temperature(temperature)
        check_weights(inter=inter, intra=intra)
        super().__init__()
        self.temperature, self.inter, self.intra, self.standardize = temperature, inter, intra, standardize

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are not used."""
        student, teacher = _standardized(self, student, teacher, valid)
        return dist(student, teacher, self.temperature, valid, inter=self.inter, intra=self.intra)


@final
class ShuffledOffClass(LogitLoss):
    """:func:`distill.losses.shuffled_off_class` as a module.

    Args:
        temperature: T > 0.
        standardize: Whether logits become z-scores first, see :func:`distill.losses.standardize`.
    """

    needs_labels = True

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature, self.standardize = temperature, standardize

    def forward(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are needed."""
        student, teacher = _standardized(self, student, teacher, valid)
        return shuffled_off_class(student, teacher, self.temperature, valid, labels=needed_labels(self, labels))


@final
class LabelSmoothing(LogitLoss):
    """:func:`distill.losses.label_smoothing` as a module.

    Args:
        smoothing: Share of the target spread evenly over the classes, in [0, 1).
    """

    needs_labels = True
    needs_teacher = False

    def __init__(self, smoothing: float = 0.1) -> None:
        check_smoothing(smoothing)
        super().__init__()
        self.smoothing = smoothing

    def forward(
        self, student: Tensor, teacher: Tensor | None = None, valid: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss; labels are needed, the teacher is not used."""
        return label_smoothing(student, needed_labels(self, labels), self.smoothing, valid)


@final
class Hint(FeatureLoss):
    """:func:`distill.losses.hint` as a module."""

    projects = True

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return hint(student, teacher, valid)


@final
class Cosine(FeatureLoss):
    """:func:`distill.losses.cosine` as a module."""

    projects = True

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return cosine(student, teacher, valid)


@final
class AttentionTransfer(FeatureLoss):
    """:func:`distill.losses.attention_transfer` as a module."""

    projects = False

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return attention_transfer(student, teacher, valid)


@final
class AttentionRelation(FeatureLoss):
    """:func:`distill.losses.attention_relation` as a module.

    Args:
        heads: Relation heads, a divisor of both widths.
    """

    projects = False

    def __init__(self, heads: int = 12) -> None:
        check_heads(heads)
        super().__init__()
        self.heads = heads

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return attention_relation(student, teacher, valid, heads=self.heads)


@final
class SimilarityPreserving(FeatureLoss):
    """:func:`distill.losses.similarity_preserving` as a module."""

    projects = False

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return similarity_preserving(student, teacher, valid)


@final
class RKD(FeatureLoss):
    """:func:`distill.losses.rkd` as a module.

    Args:
        distance: Weight of the distances, at least 0.
        angle: Weight of the angles, at least 0.
    """

    projects = False

    def __init__(self, distance: float = 1.0, angle: float = 2.0) -> None:
        check_relations(distance, angle)
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss."""
        return rkd(student, teacher, valid, distance=self.distance, angle=self.angle)


def _standardized(loss: Any, student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both logits, as z-scores if the loss standardizes."""
    if not loss.standardize:
        return student, teacher
    check_logits(student, teacher, valid)
    return standardize(student, valid), standardize(teacher.detach(), valid)


def needed_labels(loss: LogitLoss, labels: Tensor | None) -> Tensor:
    """The labels.

    Raises:
        ValueError: If there are none.
    """
    if labels is None:
        raise ValueError(
            f"{type(loss).__name__} needs labels and got None: give the class, or the number, of each position"
        )
    return labels


def _numbers(loss: nn.Module) -> str:
    return ", ".join(
        f"{name}={value}" for name, value in vars(loss).items() if not name.startswith("_") and name != "training"
    )
