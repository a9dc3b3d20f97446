"""Distillation: losses, the frozen teacher, the module that pairs it with a student, the same as a callback.

Names are loaded on first use: losses need torch only, and ``import distill`` nothing at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill import losses
    from distill.cache import CachedTeacher, cache_teacher
    from distill.callbacks import DistillationCallback
    from distill.features import capture
    from distill.hf import DistillationMixin, DistillationTrainer
    from distill.module import DistillModule
    from distill.student import cut_student
    from distill.teacher import Teacher

__all__ = [
    "CachedTeacher",
    "DistillModule",
    "DistillationCallback",
    "DistillationMixin",
    "DistillationTrainer",
    "Teacher",
    "cache_teacher",
    "capture",
    "cut_student",
    "losses",
]

_HOME = {
    "CachedTeacher": "distill.cache",
    "DistillModule": "distill.module",
    "DistillationCallback": "distill.callbacks",
    "DistillationMixin": "distill.hf",
    "DistillationTrainer": "distill.hf",
    "Teacher": "distill.teacher",
    "cache_teacher": "distill.cache",
    "capture": "distill.features",
    "cut_student": "distill.student",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("distill.losses")
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
