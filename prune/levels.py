"""How far iterative pruning goes: the densities of its levels, and when it has gone far enough."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from prune.schedule import check_density, geometric, levels_to

SPARSEST = 0.001
"""The density at which a hunt ends that is bounded by ``max_drop`` alone."""


@dataclass(frozen=True)
class Levels:
    """How far a hunt prunes, in which steps, and when it ends.

    Give `count` or `density`, or `max_drop` alone. A bare number of levels, ``levels: 8``, is ``{count: 8}``.

    Args:
        count: How many times to prune, 0 or more.
        density: Share of the prunable weights to reach, in (0, 1]: the last level is the first at or below it. Or a
            falling list with the density of every level.
        rate: Share of the remaining weights that each level prunes, in [0, 1); 0 is the control that prunes nothing.
        max_drop: End the hunt once the validation score is more than this below that of level 0, in the unit of the
            metric, 0 or more.
        patience: How many levels in a row must be below by more than `max_drop` before the hunt ends, 1 or more.
        early_stop: End a level after this many validations without a better score, 1 or more, and restore its best
            weights; by default every level trains to the end.
        tolerance: How far a level's validation score may be below the dense network's for the level to count as a
            winning ticket, in the unit of the metric.

    Raises:
        ValueError: If a value is out of range, or both `count` and `density` are given.
    """

    count: int | None = None
    density: float | list[float] | None = None
    rate: float = 0.2
    max_drop: float | None = None
    patience: int = 1
    early_stop: int | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.count is not None and (isinstance(self.count, bool) or not isinstance(self.count, int)):
            raise ValueError(f"levels is {self.count!r}: give how many times to prune, an integer such as 10")
        if self.count is not None and self.density is not None:
            raise ValueError(_ONE_OF)
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop is {self.max_drop}: give 0 or more, in the unit of the metric")
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give a number of levels, 1 or more")
        if self.early_stop is not None and self.early_stop < 1:
            raise ValueError(f"early_stop is {self.early_stop}: give a number of validations, 1 or more")
        geometric(self.rate, self.count or 0)
        if isinstance(self.density, Sequence):
            _falling(self.density)
        elif self.density is not None:
            check_density(self.density)

    @classmethod
    def parse(cls, levels: "int | Levels | None", density: float | Sequence[float] | None = None) -> "Levels":
        """The levels that arguments ``levels`` and ``density`` of a job ask for.

        Raises:
            ValueError: If a value is out of range, or they give both a number of levels and a density.
        """
        parsed = levels if isinstance(levels, Levels) else cls(levels)
        if density is None:
            return parsed
        return replace(parsed, density=list(density) if isinstance(density, Sequence) else density)

    def densities(self) -> tuple[float, ...]:
        """The density of every level, from 1 down.

        Raises:
            ValueError: If neither `count`, `density` nor `max_drop` is set.
        """
        if self.count is None and self.density is None and self.max_drop is None:
            raise ValueError(_ONE_OF)
        if self.count is not None:
            return tuple(geometric(self.rate, self.count))
        if isinstance(self.density, Sequence):
            return _falling(self.density)
        density = SPARSEST if self.density is None else self.density
        return tuple(geometric(self.rate, levels_to(density, self.rate)))

    def check_fixed(self, driver: str) -> None:
        """Refuse settings that need a hunt's record of every level's validation, for a driver that has none.

        Raises:
            ValueError: Naming the driver and the settings.
        """
        needs_scores = ("max_drop", "patience", "early_stop", "tolerance")
        unsupported = [
            each.name for each in fields(self) if each.name in needs_scores if getattr(self, each.name) != each.default
        ]
        if unsupported:
            raise ValueError(
                f"{driver} trains all levels, and has no {', '.join(unsupported)}: leave it out, or use prune.hunt"
            )


_ONE_OF = (
    "give density (e.g. 0.1, or a list of them) or levels (e.g. 10), and only one of them; max_drop (e.g. 0.02) may "
    "stand alone"
)


def _falling(densities: Sequence[float]) -> tuple[float, ...]:
    for density in densities:
        check_density(density)
    listed = (1.0, *(density for density in densities if density != 1))
    if len(listed) < 2 or any(later >= earlier for earlier, later in itertools.pairwise(listed)):
        raise ValueError(
            f"density is {list(densities)}: give densities below 1 in falling order, such as [0.5, 0.2, 0.1]"
        )
    return listed
