"""What job ``export`` records."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Export:
    """One file or folder that an export stage wrote.

    Attributes:
        format: ``compact``, ``torch`` or ``onnx``.
        path: In the stage's folder.
        bytes: On disk.
        largest_difference: Of its outputs and the trained network's, on inputs that the stage kept.
        same_predictions: Whether it predicts the same for all of these: the largest class, a yes or no of each label,
            or numbers within 1% of the largest.
    """

    format: str | None = None
    path: str | None = None
    bytes: float | None = None
    largest_difference: float | None = None
    same_predictions: bool | None = None


@dataclass(frozen=True)
class ExportResult:
    """Of job ``export``, beside metrics and size of what was exported.

    Attributes:
        exports: What was written.
        level: Of a hunt, the one exported.
        values: Type of the compact checkpoint's values.
    """

    exports: list[Export] = field(default_factory=list)
    level: int | None = None
    values: str | None = None
