"""What a report knows of each stage: rows of the main table, and checkpoints to pick from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.records import Size, Stage
from workbench.report.format import Metric


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        bytes: On disk.
        label: Which of the stage's it is, such as ``level 3`` or ``onnx``; empty where there is one.
        metrics: Its own, by name with split; None where it was verified to reproduce its parent's predictions.
    """

    bytes: float | None
    label: str = ""
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Outcome:
    """The content of a stage's row.

    Attributes:
        metrics: By name with split.
        size: Counts and bytes.
        history: A row an epoch, for the figure of learning.
        label: Which of the stage's networks this is, such as ``level 7``; empty where there is one.
        dense: Name and metrics of the stage's own dense network, which its test metric is compared with; without it,
            that is the parent.
        stored: What the column "on disk" shows; by default the checkpoint of ``size``.
        checkpoints: All to pick the smallest good one from; by default ``stored``.
        compared: Name and metrics of what its test metric is compared with, where that is neither of these.
        verified: Whether all of them were verified to reproduce the parent's predictions.
        measured: Metrics of other networks of the stage: whether a metric is a share is decided by all its values.
    """

    metrics: Mapping[str, float]
    size: Size
    history: Sequence[Mapping[str, float]] = ()
    label: str = ""
    dense: tuple[str, Mapping[str, float]] | None = None
    stored: Checkpoint | None = None
    checkpoints: Sequence[Checkpoint] | None = None
    compared: tuple[str, Mapping[str, float]] | None = None
    verified: bool = False
    measured: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Row:
    """One finished stage in numbers; None if not recorded.

    Attributes:
        stage: The stage.
        outcome: Its metrics, size and checkpoints.
        metric: Its main metric.
        activation: The activation's name, its own or inherited from the network it started from.
        parent: Role and name of the stage it came from.
        validation: The main metric on validation data.
        test: The main metric on test data.
        against: What ``change`` is measured against.
        change: ``test`` less that of ``against``.
        stored: What is on disk.
        smaller: The reference's dense fp32 bytes / the bytes on disk.
        reproduces: The stage whose predictions every checkpoint was verified to reproduce.
        seeded: Whether its job draws random numbers.
        is_dense: Whether the figures are those of the stage's own dense network.
    """

    stage: Stage
    outcome: Outcome
    metric: Metric
    activation: str | None
    parent: tuple[str, str] | None
    validation: float | None
    test: float | None
    against: str | None
    change: float | None
    stored: Checkpoint
    smaller: float | None
    reproduces: str | None
    seeded: bool
    is_dense: bool = False

    @property
    def dense_bytes(self) -> float | None:
        """What the stage's weights take in dense fp32."""
        return self.outcome.size.dense_fp32_bytes


@dataclass(frozen=True)
class Pick:
    """The smallest checkpoint within the tolerance on validation data, and the stage whose figures it has."""

    row: Row
    checkpoint: Checkpoint
    bytes: float
    source: str
    test: float | None
