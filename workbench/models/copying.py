"""Copies of networks, with what their last call left in them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """A copy of a network, which is not changed.

    Layers keep results of their last call: the weight that ``torch.nn.utils.weight_norm``, ``spectral_norm`` or
    ``prune`` compute by a hook, features that a network stores in itself. ``copy.deepcopy`` refuses these where they
    have a gradient history; the copy has their values alone. The next call of a hook computes its weight anew.

    Args:
        network: Any module.
    """
    results = {id(each): each.detach().clone() for each in _kept(network.modules()) if not each.is_leaf}
    return copy.deepcopy(network, results)


def _kept(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors that modules hold as attributes, alone or in a list, tuple or dict, or as buffers."""
    for module in modules:
        for value in (*vars(module).values(), module._buffers):
            yield from (each for each in _items(value) if isinstance(each, Tensor))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else (value,)
