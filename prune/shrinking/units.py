"""Units: what can be removed from a network whole, and where each unit is in each layer.

Vocabulary, as in Torch-Pruning:

- a *unit* is the smallest thing that can be removed: a channel, a hidden unit, an attention head, a group of a
  GroupNorm;
- a *dependency group* (``Group``) holds units that the same layers produce and the same layers consume. Removing unit
  u means removing, in every slot of the group, the indices ``slot.indices[u]``;
- a *slot* is the part of a group in one layer: rows of a producer, columns of a consumer, channels of a layer between.

Invariants:

- all slots of a group have the same number of units, in the same order: unit u of one slot is unit u of every other;
- the index tuples of a slot are disjoint, so removing one unit never removes part of another;
- the first slot is a producer ("outputs"), and its layer names the group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

Side = Literal["outputs", "inputs", "channels"]


@dataclass(frozen=True)
class Slot:
    """The part of a group in one layer.

    Attributes:
        layer: path of the layer.
        side: "outputs" for rows of its weight and entries of its bias, "inputs" for columns of its weight, "channels"
            for a layer that treats every channel alone (a norm, a PReLU, a depthwise convolution).
        indices: unit -> its indices along that side, ascending.
    """

    layer: str
    side: Side
    indices: tuple[tuple[int, ...], ...]

    def select(self, mask: Tensor) -> list[int]:
        """The indices of the units in ``mask``, bool, [units]."""
        return [index for unit in mask.nonzero().flatten().tolist() for index in self.indices[unit]]


@dataclass(frozen=True)
class Group:
    """Units that the same layers produce and the same layers consume.

    Attributes:
        name: of the first layer that produces them.
        slots: one for each side of each layer that they are in.
        counts: what to subtract from attributes that count units, such as ``num_heads``.
    """

    name: str
    slots: tuple[Slot, ...]
    counts: Mapping["Attribute", int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.slots[0].indices)

    @property
    def producers(self) -> tuple[Slot, ...]:
        """Where units are computed or pass through."""
        return tuple(slot for slot in self.slots if slot.side != "inputs")

    @property
    def consumers(self) -> tuple[Slot, ...]:
        """Where units are read."""
        return tuple(slot for slot in self.slots if slot.side == "inputs")


class Attribute(NamedTuple):
    """An integer attribute of a module that changes by a fixed amount with every unit."""

    module: str
    name: str


class Selection(NamedTuple):
    """Some units of a group; ``mask`` is bool, [units]."""

    group: Group
    mask: Tensor


def removed_outputs(selections: Iterable[Selection]) -> dict[str, list[int]]:
    """Layer -> the indices of its outputs that the selected units have."""
    return {
        slot.layer: slot.select(mask)
        for group, mask in selections
        for slot in group.producers
        if slot.side == "outputs"
    }
