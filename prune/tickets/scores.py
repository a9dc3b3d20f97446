"""The validation scores of a hunt's levels, and whether they have dropped too far."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def has_dropped(levels: Sequence[Mapping[str, Any]], max_drop: float | None, patience: int) -> bool:
    """Whether the last ``patience`` levels all score more than ``max_drop`` below level 0, on validation data.

    Args:
        levels: Records of the levels so far.
        max_drop: In the unit of the main metric, 0 or more; None never ends a hunt.
        patience: 1 or more.

    Raises:
        ValueError: If level 0 has no validation score to compare with.
    """
    if max_drop is None:
        return False
    dense, *others = scores(levels)
    if not math.isfinite(dense):
        name, _ = levels[0]["monitor"]
        raise ValueError(
            f"max_drop is {max_drop}, but level 0 has no finite val/{name} to compare with: give validation data, let "
            "the module log that, or bound the hunt by density or levels alone"
        )
    # A level that diverged has NaN, which is no score above the bound.
    return len(others) >= patience and all(not score >= dense - max_drop for score in others[-patience:])


def sparsest_winning(levels: Sequence[Mapping[str, Any]], tolerance: float) -> int | None:
    """The sparsest level whose validation score is within ``tolerance`` of the dense network's; None without scores."""
    dense, *_ = every = scores(levels)
    if not math.isfinite(dense):
        return None
    # A score that is below by the tolerance exactly, as 0.96 of 0.97 by 0.01, is within it.
    return max(level for level, score in enumerate(every) if score >= dense - tolerance - 1e-12 or level == 0)


def scores(levels: Sequence[Mapping[str, Any]]) -> list[float]:
    """The main validation metric of every level, the higher the better; NaN where there is none."""
    name, mode = levels[0]["monitor"]
    sign = 1 if mode == "max" else -1
    return [sign * level["metrics"].get(f"val/{name}", math.nan) for level in levels]
