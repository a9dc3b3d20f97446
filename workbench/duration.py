"""One time type: epochs or optimizer steps, written "3ep" or "500it"."""

import re
from typing import Literal, NamedTuple

_PATTERN = re.compile(r"([0-9]{1,15})\s*(ep|it)")


class Duration(NamedTuple):
    """A length of training.

    Args:
        value: How many, zero or more.
        unit: ``"ep"`` for epochs, ``"it"`` for iterations, that is optimizer updates.
    """

    # Not a dataclass: jsonargparse would take one apart into options of its own, and it is one word to the user.
    value: int
    unit: Literal["ep", "it"]

    def __str__(self) -> str:
        return f"{self.value}{self.unit}"

    def steps(self, per_epoch: int) -> int:
        """Optimizer updates in this duration, where one epoch has ``per_epoch`` of them."""
        return self.value * per_epoch if self.unit == "ep" else self.value

    @classmethod
    def parse(cls, text: "str | Duration") -> "Duration":
        """Read ``"3ep"`` or ``"500it"``.

        Raises:
            ValueError: If the text is anything else, with the forms that are allowed.
        """
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"duration {text!r}: write epochs as '3ep' or optimizer steps as '500it'")
        return cls(int(match[1]), "ep" if match[2] == "ep" else "it")
