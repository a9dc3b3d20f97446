"""What every trainer shares: the teacher behind an argument, its outputs for a batch, and how far training is."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.cache import CachedTeacher, open_teacher
from distill.features import matches
from distill.objective import Outputs
from distill.teacher import Teacher
from workbench.models.wrappers import unwrap
from workbench.records.source import Source
from workbench.tasks import LanguageModelling, LogitsSpec, Task, scored

TeacherLike = Teacher | CachedTeacher | nn.Module | Source | Path


def as_teacher(teacher: TeacherLike, logits: LogitsSpec | None = None) -> Teacher | CachedTeacher:
    """The teacher itself, or one made of a network, or loaded from a folder, which may hold a cache.

    Args:
        teacher: The teacher, or where it comes from.
        logits: Where the logits are in what it returns, see :class:`distill.Teacher`.

    Raises:
        ValueError: If there is nothing to load, or logits are to be looked for in a cache or elsewhere than a Teacher
            says.
    """
    if isinstance(teacher, str | Path):
        teacher = open_teacher(teacher)
    elif not isinstance(teacher, Teacher | CachedTeacher):
        teacher = Teacher(teacher)
    if logits is None:
        return teacher
    if isinstance(teacher, CachedTeacher):
        raise ValueError(
            f"teacher_logits is {logits!r}, and a cache holds logits already: leave it out, and cache "
            "Teacher(..., logits=...)"
        )
    if teacher.logits not in (None, logits):
        raise ValueError(f"teacher_logits is {logits!r}, and the teacher's own logits {teacher.logits!r}: give one")
    teacher = copy.copy(teacher)
    teacher.logits = logits
    return teacher


def task_targets(
    teacher: Teacher | CachedTeacher,
    task: Task,
    batch: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cached: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] = (),
    logits: bool = True,
) -> Outputs:
    """:func:`targets_of` for a batch of a task, at the positions that it scores."""
    if isinstance(task, LanguageModelling):
        targets = targets_of(teacher, args, kwargs, cached, layers=layers, logits=logits, score=task.aligned)
        scores = targets.logits
        return targets if scores is None else targets._replace(logits=scores[..., : task.vocabulary])
    score = functools.partial(scored, task, batch=batch)
    return targets_of(teacher, args, kwargs, cached, layers=layers, logits=logits, score=score)


def targets_of(
    teacher: Teacher | CachedTeacher,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cached: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] = (),
    logits: bool = True,
    score: Callable[[Tensor], Tensor] = lambda outputs: outputs,
    match: bool = False,
) -> Outputs:
    """A teacher's outputs for a batch, live or cached.

    Args:
        teacher: A live teacher, or a cache.
        args: Positional arguments of the student.
        kwargs: Keyword arguments of the student; the teacher gets them without ``labels``.
        cached: Cached targets of the batch, see :class:`distill.cache.CachedBatch`; None to run the teacher.
        layers: Layers of the teacher whose features are needed.
        logits: Whether the teacher's logits are needed.
        score: Selects the scored positions of the model's outputs, such as all but the last of a causal model.
        match: Whether a live teacher gets only the keyword arguments that it names.

    Raises:
        ValueError: If the teacher is a cache and the batch has no cached targets, the cached targets lack logits or
            features that are needed, or a live teacher returns no logits.
    """
    if cached is not None:
        prefix = "feature/"
        features = {name.removeprefix(prefix): value for name, value in cached.items() if name.startswith(prefix)}
        _check_cached(cached, features, layers, logits)
        scores = score(cached["logits"]) if "logits" in cached else None
        if "ids" not in cached:
            return Outputs(scores, features)
        return Outputs(scores, features, (score(cached["ids"]), score(cached["weights"]), score(cached["log_probs"])))
    if isinstance(teacher, CachedTeacher):
        raise ValueError(
            "the teacher is a cache and the batch comes without cached targets: train on a loader that attach returned"
        )
    inputs = {name: value for name, value in kwargs.items() if name != "labels"}
    raw, features = teacher.outputs(args, inputs, layers, match)
    return Outputs(score(teacher.select(raw)) if logits else None, features)


def decoder_inputs(student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's inputs that an encoder-decoder of transformers makes of its labels, which a teacher does not get.

    Args:
        student: The network.
        inputs: Its keyword arguments.

    Returns:
        ``decoder_input_ids``; nothing if they are given, there are no labels, or it is another network.
    """
    shift_right: Any = getattr(unwrap(student, adapters=True), "prepare_decoder_input_ids_from_labels", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & {n for n, value in inputs.items() if value is not None}
    if shift_right is None or given or not isinstance(inputs.get("labels"), Tensor):
        return {}
    return {"decoder_input_ids": shift_right(labels=inputs["labels"])}


def _check_cached(cached: Mapping[str, Any], features: Mapping[str, Any], layers: Sequence[str], logits: bool) -> None:
    """Raises: ValueError: if cached targets lack the logits or features that are needed."""
    if logits and not {"logits", "ids"} & set(cached):
        raise ValueError(
            f"the cache has no logits, which a term compares, only {', '.join(sorted(cached)) or 'nothing'}: cache a "
            "teacher that returns logits, or leave that term out"
        )
    if missing := [layer for layer in layers if not any(matches(name, layer) for name in features)]:
        raise ValueError(
            f"the cache has features of {', '.join(features) or 'nothing'} and not of '{missing[0]}': cache again with "
            f"features: {list(layers)}"
        )


def training_progress(trainer: Any, unit: str) -> float:
    """How many epochs ("ep") or updates ("it") a Lightning trainer has done; 0 without a trainer."""
    if trainer is None:
        return 0.0
    if unit == "it":
        return float(trainer.global_step)
    return trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_idx / trainer.num_training_batches
