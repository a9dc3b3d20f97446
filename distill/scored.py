"""What of a batch a student is scored on: its outputs in scored form, which of them count, and the labels there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from workbench.models.forward import LABELS
from workbench.models.positions import IGNORED, tokens_of, valid_tokens
from workbench.tasks import OutputType, Task, scored
from workbench.training.module import SupervisedModule

_NAMES = (*sorted(LABELS, key="labels".__ne__), "targets", "target", "y")


class Scores(NamedTuple):
    """The scored part of a batch.

    Args:
        logits: Outputs in scored form, see :class:`workbench.tasks.OutputType`.
        valid: Bool: which of them count.
        labels: Their labels, of the shape of ``valid``; None if there are none.
        tokens: Bool [B, L]: which tokens are no padding; None where the batch does not say it.
    """

    logits: Tensor
    valid: Tensor
    labels: Tensor | None
    tokens: Tensor | None


def by_task(module: SupervisedModule, raw: Any, batch: Any) -> Scores:
    """What the task of a module scores of its network's output."""
    task: Task = module.task
    logits = scored(task, raw, batch, module.logits)
    return Scores(logits, task.valid(batch), task.targets(batch), tokens_of(batch))


def find_labels(batch: Any) -> Tensor | None:
    """The labels of a batch, by their usual names in a mapping, or last in a tuple; None if there are none."""
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in _NAMES if name in batch), None)
    else:
        labels = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return labels if isinstance(labels, Tensor) else None


def aligned_labels(student: nn.Module, batch: Any, tokens: Tensor | None, ignore_index: int = IGNORED) -> Tensor | None:
    """The labels of a batch at the outputs that predict them.

    Those of a mapping for a causal model of transformers belong to the tokens of the same position, and without any the
    tokens are the labels: each moves to the output before it, and the last output has none. Padding has none either.
    Labels in a tuple are as they are.
    """
    labels = find_labels(batch)
    if not isinstance(batch, Mapping) or not _is_causal(student):
        return labels
    own = batch.get("input_ids") if labels is None else labels
    if not isinstance(own, Tensor) or own.ndim != 2:
        return labels
    own = own.long()  # bytes would take -100 for 156
    valid = valid_tokens(own, tokens, ignore_index=ignore_index)
    return nn.functional.pad(own[:, 1:].masked_fill(~valid, ignore_index), (0, 1), value=ignore_index)


def by_labels(
    outputs: OutputType, logits: Tensor, labels: Tensor | None, tokens: Tensor | None, ignore_index: int = IGNORED
) -> Scores:
    """What is scored of a network without a task: where there is a label, and no padding.

    Args:
        outputs: What the outputs are.
        logits: What the network returned.
        labels: Its labels, at the outputs that predict them.
        tokens: Bool [B, L]: which tokens are no padding.
        ignore_index: Label of positions that do not count.

    Raises:
        ValueError: If the labels do not go with the outputs.
    """
    logits = outputs.scored(logits)
    valid, labels = outputs.positions(logits, labels, ignore_index)
    if outputs.kind == "classes" and tokens is not None and tokens.shape == valid.shape:
        valid = valid & tokens
    return Scores(logits, valid, labels, tokens)


def _is_causal(student: nn.Module) -> bool:
    """Whether it is a causal language model of transformers."""
    if not hasattr(getattr(student, "config", None), "model_type"):
        return False
    from distill.hf_labels import label_spec

    return label_spec(student).causal
