"""Data sets as Lightning data modules, imported when they are first touched."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.data.augment import Augment
    from workbench.data.digits import Digits
    from workbench.data.idx import IDXImages
    from workbench.data.parquet import ParquetImages
    from workbench.data.series.classification import SeriesClassification
    from workbench.data.series.forecast import SeriesForecast
    from workbench.data.text.classification import TextClassification
    from workbench.data.text.sentences import Sentences
    from workbench.data.text.sequences import TextSequences
    from workbench.data.text.stream import TextStream

__all__ = [
    "Augment",
    "Digits",
    "IDXImages",
    "ParquetImages",
    "Sentences",
    "SeriesClassification",
    "SeriesForecast",
    "TextClassification",
    "TextSequences",
    "TextStream",
]

_HOME = {
    "Augment": "workbench.data.augment",
    "Digits": "workbench.data.digits",
    "IDXImages": "workbench.data.idx",
    "ParquetImages": "workbench.data.parquet",
    "Sentences": "workbench.data.text.sentences",
    "SeriesClassification": "workbench.data.series.classification",
    "SeriesForecast": "workbench.data.series.forecast",
    "TextClassification": "workbench.data.text.classification",
    "TextSequences": "workbench.data.text.sequences",
    "TextStream": "workbench.data.text.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
