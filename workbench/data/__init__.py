"""Data sets as Lightning data modules. Names are imported on first use."""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.data.augment import Augment
    from workbench.data.digits import Digits
    from workbench.data.idx import IDXImages
    from workbench.data.pairs import DigitPairs
    from workbench.data.parquet import ParquetImages
    from workbench.data.series.classification import SeriesClassification
    from workbench.data.series.forecast import SeriesForecast
    from workbench.data.shapes import Shapes
    from workbench.data.text.classification import TextClassification
    from workbench.data.text.sentences import Sentences
    from workbench.data.text.sequences import TextSequences
    from workbench.data.text.stream import TextStream

__all__ = [
    "Augment",
    "DigitPairs",
    "Digits",
    "IDXImages",
    "ParquetImages",
    "Sentences",
    "SeriesClassification",
    "SeriesForecast",
    "Shapes",
    "TextClassification",
    "TextSequences",
    "TextStream",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "Augment": "workbench.data.augment",
        "DigitPairs": "workbench.data.pairs",
        "Digits": "workbench.data.digits",
        "IDXImages": "workbench.data.idx",
        "ParquetImages": "workbench.data.parquet",
        "Sentences": "workbench.data.text.sentences",
        "SeriesClassification": "workbench.data.series.classification",
        "SeriesForecast": "workbench.data.series.forecast",
        "Shapes": "workbench.data.shapes",
        "TextClassification": "workbench.data.text.classification",
        "TextSequences": "workbench.data.text.sequences",
        "TextStream": "workbench.data.text.stream",
    },
)
