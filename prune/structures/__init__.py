"""Structures: which weights are kept or pruned together, and their names.

A structure divides weights into units. Scores are pooled over a unit, a density is a share of units, and masks are
expanded from units to weights; so every criterion and every allocation works with every structure.
"""

import re

from prune.structures.groups import Block, Channel
from prune.structures.layout import Layout, Structure
from prune.structures.transformers import FFN, Head
from prune.structures.weights import NM, Balanced, Unstructured
from workbench.messages import nearest

__all__ = [
    "FFN",
    "NM",
    "STRUCTURES",
    "Balanced",
    "Block",
    "Channel",
    "Head",
    "Layout",
    "Structure",
    "Unstructured",
    "structure_named",
]

STRUCTURES = {
    "unstructured": Unstructured,
    "channel": Channel,
    "head": Head,
    "ffn": FFN,
    "balanced": Balanced,
}

_INSTANCES = {"block": "Block(rows, columns), or 4x4", "nm": "NM(n, m), or 2:4", "coupled": "Coupled(example_inputs)"}


def structure_named(name: str) -> Structure:
    """A structure by its name: a row of ``STRUCTURES``, any n:m, or blocks of any rows x columns (4x4, block4x4).

    Raises:
        ValueError: if there is none of that name, naming the nearest.
    """
    if name in STRUCTURES:
        return STRUCTURES[name]()
    if sizes := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(sizes[1]), int(sizes[2]))
    if sizes := re.fullmatch(r"(?:block)?(\d+)x(\d+)", name):
        return Block(int(sizes[1]), int(sizes[2]))
    if name in _INSTANCES:
        raise ValueError(f"structure {name!r} needs arguments: give {_INSTANCES[name]}")
    names = [*STRUCTURES, "2:4", "4x4"]
    raise ValueError(f"unknown structure {name!r}{nearest(name, names)} Any n:m or rows x columns is one, too")
