"""Which positions stand or fall together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prune.selection import keep_top_k


class Structure(Protocol):
    """Selects weights by score: a total for all tensors, or a number for each by name."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        k: int | Mapping[str, int],
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Masks of the scores' shapes."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Every weight stands for itself."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        k: int | Mapping[str, int],
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Keep the weights with the highest scores, exactly as many as asked.

        Args:
            scores: parameter name -> scores, any shape.
            k: an int lets all weights compete for that many places (``keep_top_k``); a mapping gives each
                tensor its own number of places, by name.
            within: as in ``keep_top_k``.

        Returns:
            Parameter name -> bool mask of the scores' shape, on their device.

        Raises:
            ValueError: as ``keep_top_k``; or if a mapping ``k`` does not name exactly the tensors in
                ``scores``.
        """
        if isinstance(k, int):
            return keep_top_k(scores, k, within)
        if k.keys() != scores.keys():
            raise ValueError(
                f"k has counts for {sorted(k)}, but scores are for {sorted(scores)}: name the same tensors"
            )
        masks = {}
        for name, score in scores.items():
            alive = None if within is None else {name: within[name]}
            masks |= keep_top_k({name: score}, k[name], alive)
        return masks
