"""What trainers of all kinds share: asking a teacher about a batch, and the projectors of several ranks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.cache import CachedTeacher, open_teacher
from distill.features import matches
from distill.objective import Outputs
from distill.teacher import Teacher
from workbench.records.source import Source
from workbench.tasks import logits_of

TeacherLike = Teacher | CachedTeacher | nn.Module | Source | Path


def as_teacher(teacher: TeacherLike) -> Teacher | CachedTeacher:
    """The teacher itself, or one made of a network, or loaded from a folder, which may hold a cache.

    Raises:
        ValueError: If there is nothing to load.
    """
    if isinstance(teacher, Teacher | CachedTeacher):
        return teacher
    return open_teacher(teacher) if isinstance(teacher, str | Path) else Teacher(teacher)


def targets_of(
    teacher: Teacher | CachedTeacher,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cached: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] = (),
    logits: bool = True,
    score: Callable[[Tensor], Tensor] = lambda outputs: outputs,
) -> Outputs:
    """What a teacher says of a batch.

    Args:
        teacher: Live, or a cache.
        args: Positional arguments of the student.
        kwargs: Keyword arguments; ``labels`` are kept from the teacher.
        cached: What a cache said, see :class:`distill.cache.CachedBatch`; None if the teacher is to be asked.
        layers: Its submodules whose features are wanted.
        logits: Whether the answer must have logits.
        score: Outputs of the model -> those that are scored, such as all but the last of a causal model.

    Raises:
        ValueError: If the teacher is a cache and nothing of it came with the batch, or what came lacks the logits or
            features that are wanted; or if a live teacher's answer has no logits.
    """
    if cached is not None:
        features = {
            name.removeprefix("feature/"): value for name, value in cached.items() if name.startswith("feature/")
        }
        _check_kept(cached, features, layers, logits)
        known = score(cached["logits"]) if "logits" in cached else None
        if "ids" not in cached:
            return Outputs(known, features)
        return Outputs(known, features, (score(cached["ids"]), score(cached["weights"]), score(cached["log_probs"])))
    if isinstance(teacher, CachedTeacher):
        raise ValueError(
            "the teacher is a cache and the batch comes without what it says: train on a loader that attach returned"
        )
    named = {name: value for name, value in kwargs.items() if name != "labels"}
    raw, features = teacher.outputs(args, named, layers)
    return Outputs(score(logits_of(raw, "the teacher")) if logits else None, features)


def _check_kept(cached: Mapping[str, Any], features: Mapping[str, Any], layers: Sequence[str], logits: bool) -> None:
    """Raises: ValueError: if a cache has not what is wanted of it."""
    if logits and not {"logits", "ids"} & set(cached):
        raise ValueError(
            f"the cache has no logits, which a term compares, only {', '.join(sorted(cached)) or 'nothing'}: cache a "
            "teacher that returns logits, or leave that term away"
        )
    if lacking := [layer for layer in layers if not any(matches(name, layer) for name in features)]:
        raise ValueError(
            f"the cache has features of {', '.join(features) or 'nothing'} and not of '{lacking[0]}': cache again with "
            f"features: {list(layers)}"
        )


def elapsed(trainer: Any, unit: str) -> float:
    """Epochs ("ep") or updates ("it") that a Lightning trainer has done so far; 0 without one."""
    if trainer is None:
        return 0.0
    if unit == "it":
        return float(trainer.global_step)
    return trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_idx / trainer.num_training_batches
