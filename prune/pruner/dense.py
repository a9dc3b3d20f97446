"""Matrices of a model that a pruner leaves dense, by name."""

import re
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from prune.masks.memory import shared_memory
from workbench.distributed.ranks import rank
from workbench.models.matrices import named_as_no_matrix, refusal
from workbench.models.wrappers import submodule

_SHOWN = 3
_TOLD: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Left:
    """A matrix that stays dense.

    Attributes:
        name: of the parameter.
        share: of all parameters of the model, in [0, 1].
        why: in words.
    """

    name: str
    share: float
    why: str


def left_dense(model: nn.Module, candidates: Mapping[str, str | None]) -> list[Left]:
    """Those of ``candidates`` that are matrices outside embeddings and norms, the largest first.

    A matrix has two dimensions longer than 1. Embeddings are layers of that name, and parameters called so, such as
    ``pos_embed``.

    Args:
        model: anything.
        candidates: parameter name -> why it is not pruned; None to look that up.
    """
    groups = shared_memory(model)
    total = sum(max(p.numel() for _, p in group) for group in groups)
    left = [
        Left(name, parameter.numel() / total, candidates[name] or refusal(model, name))
        for name, parameter, aliases in ((*group[0], [alias for alias, _ in group]) for group in groups)
        if name in candidates and _is_matrix(parameter) and not any(_is_exempt(model, alias) for alias in aliases)
    ]
    return sorted(left, key=lambda each: -each.share)


def tell(model: nn.Module, left: list[Left]) -> None:
    """Warn of matrices that stay dense, once a model.

    Warns:
        UserWarning: by name, with their shares of the model.
    """
    if not left:
        return
    by_reason: dict[str, list[str]] = {}
    for each in left:
        by_reason.setdefault(each.why, []).append(f"'{each.name}' ({each.share:.1%})")
    named = "; ".join(
        f"{', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}: {why}"
        for why, names in by_reason.items()
    )
    text = (
        f"{sum(each.share for each in left):.1%} of the parameters of this {type(model).__name__} are matrices that "
        f"stay dense: {named}. The density is that of the others; exclude these to have them dense without a word"
    )
    told = _TOLD.setdefault(model, set())
    if text not in told and rank() == 0:
        told.add(text)
        warnings.warn(text, stacklevel=3)


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) > 1


def _is_exempt(model: nn.Module, name: str) -> bool:
    """Whether it is of an embedding, a norm or a bias."""
    path, _, attribute = name.rpartition(".")
    owner, _, tensor = path.rpartition(".")
    above, _, marker = owner.rpartition(".")
    path, attribute = (above, tensor) if marker == "parametrizations" else (path, attribute)
    kind = type(submodule(model, path)).__name__.lower()
    called = next((step for step in reversed(path.lower().split(".")) if not step.isdigit()), "")
    norm = re.search(r"norm(\dd)?$", kind) or re.search(r"norm(_?\d+|\dd)?$", called)
    return named_as_no_matrix(attribute) or "embedding" in kind or norm is not None
