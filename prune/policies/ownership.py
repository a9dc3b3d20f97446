"""One policy at a time prunes a weight."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

# Weak, so that a policy that is dropped without detach() gives its weights free.
_OWNERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def claim(policy: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Make ``policy`` the owner of these weights.

    Raises:
        ValueError: If another policy owns one of them.
    """
    for name, weight in weights.items():
        owner = _OWNERS.setdefault(id(weight), policy)
        if owner is not policy:
            raise ValueError(
                f"'{name}' is pruned by a {type(owner).__name__} and a {type(policy).__name__} at once: let one of "
                "them leave it out (include, exclude), or end the other first"
            )


def release(policy: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Give free those of the weights that ``policy`` owns."""
    for weight in weights.values():
        if _OWNERS.get(id(weight)) is policy:
            del _OWNERS[id(weight)]
