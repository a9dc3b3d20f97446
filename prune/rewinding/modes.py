"""Ways to start a level once its mask is drawn: what goes back to an earlier moment, and what stays as trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from prune.masks.enforce import unwrap_optimizer
from prune.rewinding.start import Start

Trained = Mapping[str, Tensor]
Groups = list[dict[str, Any]]

REWINDING: dict[str, Callable[[Trained], Start]] = {
    "all": lambda _: Start("point"),
    "weights": lambda _: Start("point", optimizer=False, random=False),
    "learning_rate": lambda trained: Start("point", weights=trained),
    "fine_tuning": lambda trained: Start("end", weights=trained),
}
"""By name: the last level's weights -> where the next one starts.

- ``all``: weights, buffers, optimizer, schedules, counters, random state and data order are as at the rewind point
  (Frankle et al. 2020, arXiv:1912.05671).
- ``weights``: as ``all``, but the optimizer starts with empty state and random numbers follow from the seed.
- ``learning_rate``: everything but weights and buffers, which stay as trained (Renda et al. 2020, arXiv:2003.02389).
- ``fine_tuning``: nothing: trained on at the last learning rate, for as long as the others from the rewind point on.
"""


def groups_of(optimizer: Any) -> Groups:
    """What the optimizer steps each of its groups with, learning rate, momentum and all, copied; no parameters."""
    groups = unwrap_optimizer(optimizer).param_groups
    return [{name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in groups]


def hold(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let the optimizer step its groups with ``groups``, as :func:`groups_of` gave them, whatever a schedule says.

    Raises:
        ValueError: If it has another number of groups.
    """
    live = unwrap_optimizer(optimizer).param_groups
    if len(live) != len(groups):
        raise ValueError(f"the optimizer has {len(live)} groups, {len(groups)} were kept: give one that was made alike")
    for group, kept in zip(live, groups):
        group.update(copy.deepcopy(dict(kept)))
