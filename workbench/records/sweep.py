"""What job ``sweep`` records."""

from dataclasses import dataclass, field
from typing import Any

from workbench.records.codec import Metrics, Monitor
from workbench.records.estimates import Estimate
from workbench.records.network import LOSS

SEEDS = ("seed", "seed_everything")
"""Keys of a grid that are the run's seed; every other key is a setting."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep; everything else is in its own record, in its folder.

    Attributes:
        name: Of the run.
        folder: In the sweep's.
        over: Dotted key -> the value that makes it this run.
        fingerprint: Of the run.
        attempts: That it took this time; 0 if it was finished before.
        status: ``finished`` or ``failed``.
        error: Why it is not finished.
        seconds: That it took.
        metrics: By name with split.
        monitor: Its main metric.
    """

    name: str | None
    folder: str | None
    over: dict[str, Any]
    fingerprint: str | None
    attempts: int | None = None
    status: str = "not known"
    error: str | None = None
    seconds: float | None = None
    metrics: Metrics = field(default_factory=dict)
    monitor: Monitor = LOSS


@dataclass(frozen=True)
class OverSeeds:
    """The runs of one setting.

    Attributes:
        over: Dotted key -> value, without the seed.
        n: Runs.
        metrics: Metric -> its mean over them.
    """

    over: dict[str, Any]
    n: int | None
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class SweepResult:
    """Of job ``sweep``.

    Attributes:
        runs: All of them.
        summary: Means over seeds, a row for each setting.
    """

    runs: list[Run] = field(default_factory=list)
    summary: list[OverSeeds] = field(default_factory=list)
