"""Ways to start a level once its mask is drawn: what goes back to an earlier moment, and what stays as trained."""

from collections.abc import Callable, Mapping

from torch import Tensor

from prune.hunting.trainee import Start

Trained = Mapping[str, Tensor]

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
