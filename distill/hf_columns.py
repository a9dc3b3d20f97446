"""Which columns of a data set reach student and teacher in a Trainer of transformers."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from distill.cache import CachedTeacher
from distill.teacher import Teacher
from workbench.models.forward import keywords_of


def columns_for(teacher: Teacher | CachedTeacher, named: Sequence[str] | None) -> frozenset[str]:
    """The columns that a teacher takes: those that its networks name or its cache was made of, and those ``named``."""
    if isinstance(teacher, CachedTeacher):
        return frozenset([*(teacher.columns() or ()), *(named or ())])
    return frozenset(named or ()).union(*(keywords for keywords in teacher.keywords if keywords is not None))


def teacher_only(student: nn.Module, columns: Collection[str], labels: Collection[str]) -> frozenset[str]:
    """Those of the teacher's ``columns`` that the student does not take; none if it takes any."""
    keywords = keywords_of(student)
    return frozenset() if keywords is None else frozenset(columns).difference(keywords, labels)


def check_columns(dataset: Any, kept: Collection[str], teacher: Teacher | CachedTeacher) -> None:
    """Refuse to drop a column that a teacher may need which takes any argument.

    Args:
        dataset: The training set; one without a length is not looked into.
        kept: Columns that are not dropped.
        teacher: The teacher, for which no columns were named.

    Raises:
        ValueError: If there is such a column, with numbers in it.
    """
    if isinstance(teacher, CachedTeacher) or None not in teacher.keywords:
        return
    # An iterable one has torch's __getitem__, which raises, and its first sample may be its only one.
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return
    sample = dataset[0] if len(dataset) else {}
    if not hasattr(sample, "items"):
        return
    if dropped := [name for name, value in sample.items() if name not in kept and _is_numeric(value)]:
        raise ValueError(
            f"the teacher takes any argument, **kwargs, and the student does not take {', '.join(map(repr, dropped))} "
            f"of the training set: give the Trainer those that the teacher needs, teacher_columns={dropped}, or "
            "teacher_columns=[]"
        )


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _is_numeric(value[0])
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, Tensor | int | float)
