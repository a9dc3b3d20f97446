"""Distillation: losses, the frozen teacher, and a module, a callback and a transformers Trainer that use them.

Names are imported on first use: ``distill.losses`` imports torch only, and ``import distill`` nothing at all.
"""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from distill import losses
    from distill.cache import CachedTeacher, cache_teacher
    from distill.callbacks import DistillationCallback
    from distill.features import capture
    from distill.hf import DistillationMixin, DistillationTrainer
    from distill.module import DistillModule
    from distill.student import cut_student
    from distill.teacher import Teacher
    from distill.terms import SoftTargets, Term

__all__ = [
    "CachedTeacher",
    "DistillModule",
    "DistillationCallback",
    "DistillationMixin",
    "DistillationTrainer",
    "SoftTargets",
    "Teacher",
    "Term",
    "cache_teacher",
    "capture",
    "cut_student",
    "losses",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "CachedTeacher": "distill.cache",
        "DistillModule": "distill.module",
        "DistillationCallback": "distill.callbacks",
        "DistillationMixin": "distill.hf",
        "DistillationTrainer": "distill.hf",
        "SoftTargets": "distill.terms",
        "Teacher": "distill.teacher",
        "Term": "distill.terms",
        "cache_teacher": "distill.cache",
        "capture": "distill.features",
        "cut_student": "distill.student",
        "losses": "distill.losses",
    },
)
