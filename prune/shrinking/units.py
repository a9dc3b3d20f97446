"""Outputs of layers that are one and the same thing, with the inputs that read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["outputs", "inputs", "channels"]


@dataclass(frozen=True)
class Slot:
    """What units have in one layer.

    Attributes:
        layer: its path.
        side: "outputs" for rows of its weight and entries of its bias, "inputs" for columns of its weight, "channels"
            for a layer that treats every channel alone.
        places: unit -> indices along that side.
    """

    layer: str
    side: Side
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Units:
    """Units that are made by the same layers and read by the same layers.

    Attributes:
        name: of the first layer that makes them.
        slots: what they have in each layer.
        counts: module and attribute -> how much of it one unit is, such as the number of heads.
    """

    name: str
    slots: tuple[Slot, ...]
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.slots[0].places)

    @property
    def made(self) -> tuple[Slot, ...]:
        """Where they are made or pass through."""
        return tuple(slot for slot in self.slots if slot.side != "inputs")

    @property
    def read(self) -> tuple[Slot, ...]:
        """Where they are read."""
        return tuple(slot for slot in self.slots if slot.side == "inputs")
