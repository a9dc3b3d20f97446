"""Comparison of vocabularies, and models without their output layer. Torch only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# What a configuration calls an operation between the head and the logits.
_AFTER_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
)


def check_vocabulary(student_tokens: Mapping[str, int], teacher_tokens: Mapping[str, int]) -> int:
    """Check that an id means the same token to both models.

    Args:
        student_tokens: Token -> id, such as ``tokenizer.get_vocab()`` gives.
        teacher_tokens: The same of the teacher.

    Returns:
        How many rows of an lm head they name, one more than the largest id; rows beyond are padding.

    Raises:
        ValueError: If the maps differ, equal sizes or not.
    """
    if not student_tokens:
        raise ValueError("the student's vocabulary is empty: give token -> id, such as tokenizer.get_vocab()")
    if differing := sorted(dict(student_tokens.items() ^ teacher_tokens.items())):
        examples = "; ".join(
            f"{token!r} is {student_tokens.get(token, 'unknown')} to the student and "
            f"{teacher_tokens.get(token, 'unknown')} to the teacher"
            for token in differing[:3]
        )
        raise ValueError(
            f"the vocabularies differ in {len(differing)} of {len({*student_tokens, *teacher_tokens})} tokens "
            f"({examples}): give both models one tokenizer"
        )
    return max(student_tokens.values()) + 1


def shared_vocabulary(
    student_tokens: Mapping[str, int], teacher_tokens: Mapping[str, int], padding: str | None = None
) -> int:
    """How many ids two vocabularies share, from 0 on, where each may go on with tokens of its own.

    Args:
        student_tokens: Token -> id, such as ``tokenizer.get_vocab()`` gives.
        teacher_tokens: The same of the teacher. Tokens that it alone has never occur in the student's inputs.
        padding: A token that the student alone may have: nothing is learnt where it stands.

    Returns:
        One more than the largest id that is a token to both.

    Raises:
        ValueError: If an id is another token to the teacher, or the teacher does not know a token of the student.
    """
    own, other = ({number: token for token, number in tokens.items()} for tokens in (student_tokens, teacher_tokens))
    if unlike := sorted(number for number in own.keys() & other.keys() if own[number] != other[number]):
        first = unlike[0]
        raise ValueError(
            f"{len(unlike)} ids are other tokens to the teacher, the first {first}: {own[first]!r} to the student and "
            f"{other[first]!r} to the teacher: give both models one tokenizer"
        )
    if unknown := sorted(number for number in own.keys() - other.keys() if own[number] != padding):
        first = unknown[0]
        raise ValueError(
            f"the teacher does not know {len(unknown)} of the student's tokens, the first {own[first]!r} with id "
            f"{first}: give both models one tokenizer"
        )
    return max(own.keys() & other.keys(), default=-1) + 1


def pad_vocabulary(logits: Tensor, vocabulary: int, size: int | None = None) -> Tensor:
    """Logits over ``size`` rows, of which those from ``vocabulary`` on take no probability.

    Lm heads are padded to a multiple of something, each model's to its own: the rows that name no token get ``-inf``.

    Args:
        logits: [..., rows], at least ``vocabulary`` of them.
        vocabulary: Number of tokens; see :func:`check_vocabulary`.
        size: Rows of the result; as many as there are if None.

    Returns:
        [..., size].

    Raises:
        ValueError: If there are fewer rows than tokens, or are to be.
    """
    rows = logits.shape[-1]
    size = rows if size is None else size
    if not 0 < vocabulary <= min(rows, size):
        raise ValueError(
            f"vocabulary={vocabulary} with {rows} rows of logits and size={size}: "
            "every token needs a row, before and after"
        )
    return nn.functional.pad(logits[..., :vocabulary], (0, size - vocabulary), value=float("-inf"))


@contextmanager
def headless(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` returns its last hidden states as ``logits``; yields the head, with ``weight`` and ``bias``.

    So the hidden states come through the forward of a wrapper such as DDP, and the head is applied by
    :func:`chunked_soft_target`. The head is back afterwards, also after an exception. In between it is not in the
    model's ``state_dict``.

    Args:
        model: A transformers language model, or a module that holds one.

    Raises:
        ValueError: If there is no model with an output layer in it, if that is no plain linear layer, or if the model
            changes the logits after its head, so that hidden states must not take their place.

    Example:
        >>> with headless(student) as head:
        ...     hidden = student(**inputs).logits
        >>> chunked_soft_target(hidden, head.weight, teacher_hidden, teacher_head.weight)
    """
    owner, head = _head(model)
    config = getattr(owner, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    if changes := [name for name in _AFTER_HEAD for each in configs if getattr(each, name, None) not in (None, 1, 1.0)]:
        raise ValueError(
            f"{type(owner).__name__} changes its logits after the head ({', '.join(changes)} in its config): "
            "use its logits and distill.losses"
        )
    sites = [(parent, name) for parent in owner.modules() for name, child in parent._modules.items() if child is head]
    try:
        for parent, name in sites:
            parent._modules[name] = nn.Identity()
        yield head
    finally:
        for parent, name in sites:
            parent._modules[name] = head


@torch.no_grad()
def check_headless(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Make sure that the head on hidden states gives the model's logits, on the first sample of a batch.

    Args:
        model: A language model that :func:`headless` takes, which is in eval mode meanwhile.
        args: Positional arguments of the model.
        kwargs: Keyword arguments.

    Raises:
        ValueError: If it does not: the model does something to its logits besides.
    """
    args, kwargs = tree_map_only(Tensor, lambda value: value[:1], (tuple(args), dict(kwargs)))
    modes = {module: module.training for module in model.modules()}
    try:
        logits = model.eval()(*args, **kwargs).logits
        with headless(model) as head:
            computed = head(model(*args, **kwargs).logits)
        same = computed.shape == logits.shape and torch.allclose(computed.float(), logits.float(), rtol=1e-2, atol=1e-2)
    except RuntimeError:
        same = False
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not same:
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its output layer: leave chunked out, or use its "
            "logits and distill.losses"
        )


def _head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module inside ``model`` that has ``get_output_embeddings``, and the output layer."""
    for owner in model.modules():
        get: Any = getattr(owner, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            if not isinstance(head, nn.Linear):
                raise ValueError(f"the output layer is a {type(head).__name__}: a torch.nn.Linear is needed")
            return owner, head
    raise ValueError(
        f"{type(model).__name__} names no output layer (get_output_embeddings): give a transformers language model"
    )
