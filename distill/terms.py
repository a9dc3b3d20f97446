"""The terms of what a student minimises: a loss, its weight over time, and what it compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distill.fused import check_relation
from distill.losses import (
    AttentionRelation,
    BernoulliTarget,
    EmbeddingCosine,
    FeatureLoss,
    LogitLoss,
    SoftTarget,
    SquaredError,
    check_alpha,
    check_temperature,
)
from workbench.duration import Duration
from workbench.tasks import Kind, OutputType
from workbench.tasks.outputs import output_type

Layers = str | list[str]
Progress = Callable[[str], float]


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Its weight after t of training is weight * min(1, t / warmup) * (1 - (1 - final) * min(1, t / decay)).

    Args:
        loss: A loss on the networks' outputs or on features; the task's own loss, on labels, if None.
        weight: Its factor, at least 0. A term of weight 0 is not computed, but the task's own loss is still logged.
        student: For a loss on features: layers of the student, by path or pattern as :func:`distill.features.capture`
            takes them; for a family of students, a mapping from each member's name to its layers. For a loss on
            outputs, of a network with several heads: the submodules that make them.
        teacher: The layers of the teacher, as many as of the student; the same names as the student's if None.
        warmup: How long the weight rises linearly from 0.
        decay: How long the weight takes to fall linearly to ``final`` times itself, counted from the start of training;
            None keeps it constant.
        final: Share of the weight that is left after the decay, in [0, 1].
        outputs: For a loss on outputs of which ``student`` names the heads: what they are, or their kind, see
            :class:`workbench.tasks.OutputType`.

    Raises:
        ValueError: If a number is out of range, a loss on features has no layers, a loss on heads has no ``outputs`` or
            needs labels, or the task's own loss has any of these.
    """

    loss: LogitLoss | FeatureLoss | None = None
    weight: float = 1.0
    student: Layers | dict[str, Layers] | None = None
    teacher: Layers | None = None
    warmup: Duration = Duration(0, "it")  # noqa: RUF009 - frozen
    decay: Duration | None = None
    final: float = 0.0
    outputs: OutputType | Kind | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}: give a finite number of at least 0")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is {self.final}: the share of the weight that decay leaves is between 0 and 1")
        if self.decay is not None and self.decay.value < 1:
            raise ValueError(f"decay is {self.decay}: give at least 1it, or leave it out")
        named = self.student is not None or self.teacher is not None
        if isinstance(self.loss, AttentionRelation):
            for layers in (self.student.values() if isinstance(self.student, dict) else [self.student], [self.teacher]):
                for each in layers:
                    for path in [each] if isinstance(each, str) else each or ():
                        check_relation(path)
        if isinstance(self.loss, FeatureLoss) and self.student is None:
            raise ValueError(f"{type(self.loss).__name__} compares features: name them, student: layers.1")
        if self.loss is None and (named or self.outputs is not None):
            raise ValueError("the task's own loss takes no submodules: leave student, teacher and outputs out")
        if isinstance(self.loss, LogitLoss):
            self._check_heads(self.loss, named)
        elif self.outputs is not None:
            raise ValueError(f"{type(self.loss).__name__} compares features: leave outputs out")

    @property
    def on_layers(self) -> bool:
        """Whether it compares what layers return, and not the networks' outputs."""
        return self.student is not None

    @property
    def output_type(self) -> OutputType:
        """What the heads that it compares return."""
        assert self.outputs is not None
        return output_type(self.outputs)

    def _check_heads(self, loss: LogitLoss, named: bool) -> None:
        name = type(loss).__name__
        if not named:
            if self.outputs is not None:
                raise ValueError(
                    f"{name} is given outputs: say for the whole training what the networks' outputs are, or name the "
                    "heads that this term compares, student: heads.1"
                )
            return
        if self.student is None or self.outputs is None:
            raise ValueError(
                f"{name} on submodules compares the outputs of heads: name them, student: heads.1, and say what they "
                "are, outputs: classes, labels, numbers or embedding"
            )
        if loss.needs_labels:
            raise ValueError(f"{name} needs labels, and those of a head are not known: use a loss without")
        check_kind("of heads", loss, self.output_type.kind)

    def weight_at(self, progress: Progress) -> float:
        """The weight now; ``progress("ep")`` is the number of epochs done and ``progress("it")`` that of updates."""
        weight = self.weight
        if self.warmup.value:
            weight *= min(1.0, progress(self.warmup.unit) / self.warmup.value)
        if self.decay is not None:
            weight *= 1 - (1 - self.final) * min(1.0, progress(self.decay.unit) / self.decay.value)
        return weight


@dataclass(frozen=True)
class SoftTargets:
    """The objective of Hinton et al. 2015, alpha * soft loss + (1 - alpha) * task loss, for outputs of every kind.

    ========== ================================================= =====================================
    outputs    soft loss                                         loss
    ========== ================================================= =====================================
    classes    T^2 KL(teacher || student), softmax of the        :class:`distill.losses.SoftTarget`
               classes
    labels     T^2 KL(teacher || student), a sigmoid each        :class:`distill.losses.BernoulliTarget`
    numbers    (student - teacher)^2                             :class:`distill.losses.SquaredError`
    embedding  1 - cos(student, teacher)                         :class:`distill.losses.EmbeddingCosine`
    ========== ================================================= =====================================

    Args:
        temperature: T > 0, which softens both distributions, 4 by default; only for classes and labels.
        alpha: Weight of the soft targets, from 0 (labels only) to 1 (teacher only).

    Raises:
        ValueError: If a number is out of range.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    temperature: float | None = None
    alpha: float = 0.9

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.temperature is not None:
            check_temperature(self.temperature)

    def terms(self, kind: Kind = "classes") -> dict[str, Term]:
        """The same objective as terms for outputs of this kind: ``soft`` and ``hard``.

        Raises:
            ValueError: If a temperature is given for outputs that none softens.
        """
        if self.temperature is not None and kind in ("numbers", "embedding"):
            what = "numbers" if kind == "numbers" else "embeddings"
            raise ValueError(f"temperature is {self.temperature}, and the outputs are {what}: leave it out")
        temperature = 4.0 if self.temperature is None else self.temperature
        soft: dict[Kind, LogitLoss] = {
            "classes": SoftTarget(temperature),
            "labels": BernoulliTarget(temperature),
            "numbers": SquaredError(),
            "embedding": EmbeddingCosine(),
        }
        return {"soft": Term(soft[kind], self.alpha), "hard": Term(None, 1 - self.alpha)}


Losses = SoftTargets | Mapping[str, Term]


_SOFT_LOSSES: dict[Kind, str] = {
    "classes": "SoftTarget",
    "labels": "BernoulliTarget",
    "numbers": "SquaredError",
    "embedding": "EmbeddingCosine",
}


def check_kind(name: str, loss: LogitLoss, kind: Kind) -> None:
    """Raises: ValueError: if the loss does not compare outputs of this kind."""
    # z-scores are taken over the classes.
    kinds = frozenset({"classes"}) if getattr(loss, "standardize", False) else loss.kinds
    if kind not in kinds:
        raise ValueError(
            f"term {name!r} is {loss}, which compares {' or '.join(sorted(kinds))}, and the outputs are {kind}: use "
            f"{_SOFT_LOSSES[kind]}, e.g. {{soft: {{loss: {{class_path: distill.losses.{_SOFT_LOSSES[kind]}}}, "
            "weight: 0.5}, hard: {weight: 0.5}}, or another loss that takes them"
        )
