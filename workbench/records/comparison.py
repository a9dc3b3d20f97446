"""What job ``compare`` records."""

from dataclasses import dataclass, field

from workbench.records.codec import Unbounded
from workbench.records.estimates import AccuracyDifference


@dataclass(frozen=True)
class Scored:
    """A network's scores on the split.

    Attributes:
        name: Of the teacher: the stage, or stage/member. Students are listed by name.
        accuracy: Share of right predictions, in [0, 1].
        nll: Mean negative log-likelihood, in nats.
        brier: Brier score, 0 to 2.
        ece: Expected calibration error over 15 bins, in [0, 1].
        agreement: Share of predictions that are the teacher's.
        kl: KL(teacher || student) at temperature 1, in nats.
        score: The task's main metric, where that is neither accuracy nor nll.
        gain: Accuracy less the baseline's.
        paired: That difference, with its interval and test.
    """

    name: str | None = None
    accuracy: Unbounded | None = None
    nll: Unbounded | None = None
    brier: Unbounded | None = None
    ece: Unbounded | None = None
    agreement: Unbounded | None = None
    kl: Unbounded | None = None
    score: Unbounded | None = None
    gain: Unbounded | None = None
    paired: AccuracyDifference | None = None


@dataclass(frozen=True)
class ClassScores:
    """A student by class, in the order of ``PerClass.classes``.

    Attributes:
        recall: Share of a class's samples that are right, in [0, 1].
        gained: Samples that it has right and the baseline wrong.
        lost: Samples that the baseline alone has right.
    """

    recall: list[float | None]
    gained: list[float | None]
    lost: list[float | None]


@dataclass(frozen=True)
class PerClass:
    """Results by class; of many classes, those that move most.

    Attributes:
        of: All classes there are.
        classes: Numbers of those listed.
        n: Samples of each.
        teacher: The teacher's recall of each, in [0, 1].
        students: Name -> the student's.
        names: Of the classes listed, where the data module has names.
    """

    of: float | None = None
    classes: list[int | None] = field(default_factory=list)
    n: list[float | None] = field(default_factory=list)
    teacher: list[float | None] = field(default_factory=list)
    students: dict[str, ClassScores] = field(default_factory=dict)
    names: list[str] | None = None


@dataclass(frozen=True)
class Comparison:
    """A teacher and its students on one split.

    Attributes:
        split: ``test`` or ``val``.
        baseline: The student that the others are compared with.
        n: Samples, or positions in them.
        unit: Which of the two.
        monitor: The task's main metric and its better direction, where that is neither accuracy nor nll.
        teacher: Its scores.
        students: Name -> its scores.
        per_class: Results by class.
    """

    split: str = "test"
    baseline: str | None = None
    n: float | None = None
    unit: str = "samples"
    monitor: list[str] | None = None
    teacher: Scored | None = None
    students: dict[str, Scored] = field(default_factory=dict)
    per_class: PerClass = field(default_factory=PerClass)


@dataclass(frozen=True)
class ComparisonResult:
    """Of job ``compare``: ``comparison``, None if it is empty."""

    comparison: Comparison | None = None
