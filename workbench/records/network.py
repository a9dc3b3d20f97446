"""What any job may record of a network that it trained or measured."""

from dataclasses import dataclass, field
from typing import Any

from workbench.records.codec import Metrics, Monitor

LOSS: Monitor = ("loss", "min")


@dataclass(frozen=True)
class Size:
    """Counts of weights, and bytes.

    Attributes:
        parameters: All of them.
        prunable: Weights that masks are of.
        kept: Weights that masks keep, out of the prunable ones.
        nonzero: Parameters that are not 0.
        dense_fp32_bytes: 4 bytes for every parameter.
        checkpoint_bytes: Of the compact checkpoint on disk.
    """

    parameters: float | None = None
    prunable: float | None = None
    kept: float | None = None
    nonzero: float | None = None
    dense_fp32_bytes: float | None = None
    checkpoint_bytes: float | None = None

    @property
    def density(self) -> float | None:
        """Kept / prunable weights, in [0, 1]."""
        return self.kept / self.prunable if self.kept is not None and self.prunable else None

    @property
    def model_density(self) -> float | None:
        """Kept / all parameters, in [0, 1]; those without a mask are kept."""
        if self.kept is None or self.prunable is None or not self.parameters:
            return None
        return (self.parameters - self.prunable + self.kept) / self.parameters


@dataclass(frozen=True)
class Network:
    """A network of a stage that trains several.

    Attributes:
        metrics: After training, by name with split.
        monitor: Its main metric.
        size: Counts and bytes.
        history: A row an epoch: ``epoch`` from 0, ``step``, and metrics by name.
    """

    metrics: Metrics = field(default_factory=dict)
    monitor: Monitor = LOSS
    size: Size | None = None
    history: list[Metrics] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """Of jobs ``fit``, ``distill`` and ``pretrained``, beside what every stage records of its network.

    Attributes:
        world_size: Processes that trained together.
        students: Where several networks were trained on one teacher: name -> network.
    """

    world_size: int | None = None
    students: dict[str, Network] = field(default_factory=dict)


@dataclass(frozen=True)
class ShrinkResult:
    """Of job ``shrink``.

    Attributes:
        shrunk: ``parameters`` and ``flops`` before and after, ``largest_difference`` of the outputs, and ``removed``
            units by layer.
    """

    shrunk: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheSplit:
    """A teacher's outputs on one split.

    Attributes:
        bytes: On disk.
        samples: In the split.
        views: Of each sample, where data are augmented.
        seconds: That asking the teacher took.
        shards_reused: That were there from before.
    """

    bytes: int | None = None
    samples: int | None = None
    views: int | None = None
    seconds: float | None = None
    shards_reused: int | None = None


@dataclass(frozen=True)
class CacheResult:
    """Of job ``cache``.

    Attributes:
        cache: Split -> what is kept of it.
        bytes: On disk, of all splits.
        samples: Of all splits, each as often as it has views.
        rate: Bytes written a second.
    """

    cache: dict[str, CacheSplit] = field(default_factory=dict)
    bytes: float | None = None
    samples: float | None = None
    rate: float | None = None


@dataclass(frozen=True)
class ReportResult:
    """Of job ``report``: ``page`` is the file in the stage's folder."""

    page: str | None = None
