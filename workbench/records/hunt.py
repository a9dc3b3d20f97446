"""What jobs ``hunt`` and ``transfer`` record, and the folders of their levels."""

from dataclasses import dataclass, field
from typing import Any

from workbench.records.codec import Metrics, Monitor, Unbounded
from workbench.records.network import LOSS, Size


@dataclass(frozen=True)
class Barrier:
    """The error barrier on the line between two trainings.

    Attributes:
        barrier: How far the line rises above the mean of its ends; of errors a share, of losses in their unit.
        excess: How far it rises above the straight line between its ends.
        stable: Whether it is low enough to count as none; None of losses.
        ends: What is measured at the two ends.
        alphas: Points on the line, from 0 to 1.
        heights: What is measured there.
        metric: What is measured.
        split: On which data.
        recalibrated: Whether batch norms were measured anew at each point.
    """

    barrier: Unbounded
    excess: float | None = None
    stable: bool | None = None
    ends: list[Unbounded] = field(default_factory=list)
    alphas: list[Unbounded] = field(default_factory=list)
    heights: list[Unbounded] = field(default_factory=list)
    metric: str | None = None
    split: str | None = None
    recalibrated: bool | None = None


@dataclass(frozen=True)
class Connectivity:
    """Barriers of a ticket by the split of the data (train, val, test) that the line is evaluated on.

    Attributes:
        orders: To the twin, the same ticket trained on another order of the data.
        levels: To the last level.
        twin: Metrics of the twin.
    """

    orders: dict[str, Barrier] = field(default_factory=dict)
    levels: dict[str, Barrier] = field(default_factory=dict)
    twin: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Of a trained network, on a few training batches.

    Attributes:
        units: All that were looked at.
        dead: Those that are the same for every input.
        zero: Those that are 0 for every input.
        gradient_flow: Squared norm of the gradient of the weights kept.
        gradient_ratio: That, of the weights' own squared norm.
    """

    units: Unbounded | None = None
    dead: Unbounded | None = None
    zero: Unbounded | None = None
    gradient_flow: Unbounded | None = None
    gradient_ratio: Unbounded | None = None


@dataclass(frozen=True)
class Best:
    """Where in a training the validation loss was lowest.

    Attributes:
        step: Updates done.
        score: The loss.
    """

    step: float | None = None
    score: Unbounded | None = None


@dataclass(frozen=True)
class Training:
    """One training of a level: the ticket's, or a control's.

    Attributes:
        arm: ``ticket``, or the control's name.
        level: From 0, the dense one.
        density: Kept / prunable weights, in [0, 1].
        model_density: Kept / all parameters, in [0, 1].
        metrics: After training, by name with split.
        monitor: The main metric.
        history: A row an epoch.
        size: Counts and bytes.
        seconds: That it took.
        world_size: Processes that trained together.
        mask_hash: SHA-256 of the masks.
        layers: Weight -> how many are kept, and of how many.
        checkpoint: SHA-256 of its compact checkpoint's weights.
        rewind: What was put back to which moment, and what was not.
        points: Of level 0, SHA-256 of the moments that it kept, by name.
        steps: Updates done at its beginning and at its end.
        best: Where its validation loss was lowest.
        stopped: Where early stopping ended it.
        diagnosis: Dead units and gradient flow.
        mask_distances: After each epoch, how far the mask that would be drawn next is from the epoch before's, of what
            unrelated masks with the same layers' densities are apart: 0 for the same, 1 for chance.
        status: Always ``finished``.
    """

    arm: str | None = None
    level: int | None = None
    density: float | None = None
    model_density: float | None = None
    metrics: Metrics = field(default_factory=dict)
    monitor: Monitor = LOSS
    history: list[Metrics] = field(default_factory=list)
    size: Size | None = None
    seconds: float | None = None
    world_size: int | None = None
    mask_hash: str | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    rewind: dict[str, Any] = field(default_factory=dict)
    points: dict[str, str] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    best: Best | None = None
    stopped: dict[str, Any] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    mask_distances: list[float | None] = field(default_factory=list)
    status: str | None = None

    def __post_init__(self) -> None:
        if self.density is None and self.size is not None:
            object.__setattr__(self, "density", self.size.density)
        if self.model_density is None and self.size is not None:
            object.__setattr__(self, "model_density", self.size.model_density)


@dataclass(frozen=True)
class Level(Training):
    """One level of a hunt: its ticket, and what was trained and measured beside it.

    Attributes:
        controls: Arm -> its training.
        connectivity: Barriers to other trainings.
    """

    controls: dict[str, Training] = field(default_factory=dict)
    connectivity: Connectivity | None = None


@dataclass(frozen=True)
class HuntResult:
    """Of job ``hunt``, beside metrics and size of the last level.

    Attributes:
        levels: From the dense one on.
        winning: The sparsest level within tolerance of level 0 on validation data; None without validation scores.
        tolerance: How far its score may be below level 0's, in the unit of the metric.
        pruner: What selected the weights, with the arguments of its allocation.
        world_size: Processes that trained together.
    """

    levels: list[Level] = field(default_factory=list)
    winning: int | None = None
    tolerance: float | None = None
    pruner: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None


@dataclass(frozen=True)
class TransferResult:
    """Of job ``transfer``, beside metrics and size of the ticket trained anew.

    Attributes:
        of: Which ticket: ``level``, ``mask_hash``, and whose ``weights`` it started with.
        left: Parameters that kept their own initial values.
        controls: Arm -> its training.
    """

    of: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    controls: dict[str, Training] = field(default_factory=dict)
    world_size: int | None = None
    best: Best | None = None
    stopped: dict[str, Any] = field(default_factory=dict)
    density: float | None = None
    model_density: float | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    mask_hash: str | None = None
