"""How far a hunt goes: the densities of its levels, and when it has seen enough."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prune.schedule import check_density, geometric, levels_to

SPARSEST = 0.001
"""The density at which a hunt ends that is only told how far the score may fall."""


def densities_of(
    density: float | Sequence[float] | None, levels: int | None, rate: float, fall: float | None = None
) -> tuple[float, ...]:
    """The density of every level, from 1 down.

    Args:
        density: The last one, reached by geometric levels; or those of all levels, in falling order.
        levels: How many times to prune, instead.
        rate: Share of the remaining weights pruned at a level, in [0, 1).
        fall: How far the validation score may fall, which alone is enough to go by.

    Raises:
        ValueError: If both or none are given, or densities do not fall.
    """
    if (density is None) == (levels is None) and not (density is None and fall is not None):
        raise ValueError(
            "give density (e.g. 0.1, or a list of them) or levels (e.g. 10), and only one of them; fall (e.g. 0.02) "
            "may stand alone"
        )
    if levels is not None:
        return tuple(geometric(rate, levels))
    if not isinstance(density, Sequence):
        return tuple(geometric(rate, levels_to(SPARSEST if density is None else density, rate)))
    for each in density:
        check_density(each)
    listed = (1.0, *(each for each in density if each != 1))
    if len(listed) < 2 or any(b >= a for a, b in itertools.pairwise(listed)):
        raise ValueError(
            f"density is {list(density)}: give densities below 1 in falling order, such as [0.5, 0.2, 0.1]"
        )
    return listed


def enough(levels: Sequence[Mapping[str, Any]], fall: float | None, patience: int) -> bool:
    """Whether the last ``patience`` levels all score more than ``fall`` below level 0, on validation data.

    Args:
        levels: Records of the levels so far.
        fall: In the unit of the main metric, 0 or more; None never ends.
        patience: 1 or more.

    Raises:
        ValueError: If level 0 has no validation score to fall from.
    """
    if fall is None:
        return False
    dense, *others = scores(levels)
    if not math.isfinite(dense):
        name, _ = levels[0]["monitor"]
        raise ValueError(
            f"fall is {fall}, but level 0 has no finite val/{name} to fall from: give validation data, let the module "
            f"log that, or say by density or levels alone how far to go"
        )
    return len(others) >= patience and all(not s >= dense - fall for s in others[-patience:])


def scores(levels: Sequence[Mapping[str, Any]]) -> list[float]:
    """The main validation metric of every level, the higher the better; NaN where there is none."""
    name, mode = levels[0]["monitor"]
    sign = 1 if mode == "max" else -1
    return [sign * level["metrics"].get(f"val/{name}", math.nan) for level in levels]


def derived(seed: int, *what: str | int) -> int:
    """A seed of its own for ``what``: the same in every hunt of the same seed, whatever else is done in it."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
