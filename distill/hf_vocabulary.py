"""Which rows of two language models' heads are compared, and whether a token's number means the same to both."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from distill.cache import CachedTeacher
from distill.language import shared_vocabulary
from distill.teacher import Teacher
from workbench.models.wrappers import unwrap


def vocabulary_for(
    student: nn.Module,
    teacher: Teacher | CachedTeacher,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    vocabulary: int | None = None,
) -> int | None:
    """How many rows of the heads of student and teacher are compared; None if they are no language models.

    The tokenizers are compared where both are at hand: a given one, or the one beside the weights that a model was
    loaded from, on this disk. One on disk may be older than its model, whose tokens were added since: it says which ids
    are other tokens, but cuts no rows off heads of equal size.

    Args:
        student: The student.
        teacher: Its teacher.
        tokenizer: The student's tokenizer, or a processor that has one; anything else is none.
        teacher_tokenizer: The teacher's, or a mapping from tokens to ids.
        vocabulary: How many ids both share, in place of a comparison.

    Raises:
        ValueError: If an id is another token to the teacher, the student has tokens that the teacher has not, or heads
            have unequal numbers of rows and nothing says how many are tokens, or fewer rows than there are tokens.
    """
    networks = teacher.networks if isinstance(teacher, Teacher) else []
    rows = {"student": _rows(student), **_teacher_rows(teacher)}
    counts = {role: count for role, count in rows.items() if count is not None}
    if vocabulary is None:
        given = _tokens(tokenizer)
        own = given or _tokens(_beside(student))
        if teacher_tokenizer is not None and not own:
            raise ValueError(
                "teacher_tokenizer is given, and there is no tokenizer of the student to compare it with: give the "
                "Trainer processing_class"
            )
        for other in [teacher_tokenizer] if teacher_tokenizer is not None else networks if own else []:
            tokens = _tokens(other) or (None if teacher_tokenizer is not None else _tokens(_beside(other)))
            if not own or not tokens:
                continue
            padding = getattr(tokenizer, "pad_token", None)
            known, certain = own, True
            if teacher_tokenizer is None:
                # A tokenizer on disk may be older than the model: tokens added since have rows beyond it. Against a
                # given tokenizer it is no evidence there, and of heads of one size it cuts nothing.
                if given is not None:
                    known = _without_rows_beyond(own, tokens, _rows(other) or 0, padding)
                certain = len(set(counts.values())) > 1 and len(known) == len(own)
            elif given is None:
                certain = len(set(counts.values())) > 1
            try:
                shared = shared_vocabulary(known, tokens, padding=padding)
            except ValueError as error:
                raise ValueError(
                    f"{error}; if both read the same ids, say so: teacher_tokenizer, in place of the one beside the "
                    "teacher's weights, or how many ids both share, vocabulary=N"
                ) from None
            if certain:
                vocabulary = shared if vocabulary is None else min(shared, vocabulary)
    if rows["student"] is None:
        return None
    if vocabulary is None:
        if len(set(counts.values())) > 1:
            sizes = ", ".join(f"the {role}'s {count}" for role, count in counts.items())
            raise ValueError(
                f"heads have unequal numbers of rows, {sizes}, and nothing says which are tokens: give the Trainer "
                "both tokenizers, processing_class and teacher_tokenizer, or how many ids both share, vocabulary=N"
            )
        return None
    if short := [role for role, count in counts.items() if count < vocabulary]:
        raise ValueError(
            f"the {short[0]}'s head has {counts[short[0]]} rows for {vocabulary} tokens: resize it, "
            "model.resize_token_embeddings(len(tokenizer)), or give a smaller vocabulary"
        )
    sampled = 0 if isinstance(teacher, Teacher) else teacher.describe()["entries"].get("logits", {}).get("classes")
    if sampled and sampled != vocabulary:
        raise ValueError(
            f"the cache's ids were sampled from {sampled} rows, and {vocabulary} are tokens: cache with "
            f"task=LanguageModelling({vocabulary})"
        )
    return vocabulary


def _teacher_rows(teacher: Teacher | CachedTeacher) -> dict[str, int | None]:
    """Rows of each teacher's head."""
    if isinstance(teacher, Teacher):
        rows = {f"teacher {number}": _rows(network) for number, network in enumerate(teacher.networks)}
        return {"teacher": rows["teacher 0"]} if len(rows) == 1 else rows
    entry = teacher.describe()["entries"].get("logits")
    if entry is None:
        return {}
    return {"cached teacher": entry["classes"] or entry["shape"][-1]}


def _without_rows_beyond(
    own: dict[str, int], tokens: Mapping[str, int], rows: int, padding: str | None
) -> dict[str, int]:
    """``own`` without ids for which the teacher's head has rows and its tokenizer on disk no tokens."""
    named = set(tokens.values())
    return {token: number for token, number in own.items() if token == padding or number in named or number >= rows}


def _rows(model: Any) -> int | None:
    """Rows of the head of a language model; None of another model."""
    get = getattr(unwrap(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    count = getattr(head, "out_features", None)
    return count if isinstance(count, int) else None


def _tokens(owner: Any) -> dict[str, int] | None:
    """Token -> id of a tokenizer, of a processor that has one, or of a mapping; None of anything else."""
    if isinstance(owner, Mapping):
        return dict(owner)
    for each in (owner, getattr(owner, "tokenizer", None)):
        get: Any = getattr(each, "get_vocab", None)
        if callable(get):
            tokens: Any = get()
            return tokens
    return None


def _beside(model: Any) -> Any:
    """The tokenizer beside the weights that a model was loaded from, if it is on this disk."""
    name = getattr(unwrap(model, adapters=True), "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # there is none, or one that only code of its own can read
        return None
