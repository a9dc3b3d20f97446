"""How many weights each layer keeps, counted from the layer's original size at every level.

All keep at least one weight per layer (a layer with none cuts the network in two) unless told not to, warn
when that made a difference, and give counts that fall with the density, so that levels nest. Under a structure
"weights" are its units, and "layers" whatever shares them out.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from torch import Tensor

from prune.schedule import check_density, kept
from prune.topk import keep_top_k

Shapes = Mapping[str, Sequence[Sequence[int]]]


class Allocation(Protocol):
    """Divides a density over layers, or over whatever keys a structure has."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Key -> number of units to keep.

        Args:
            scores: key -> scores of its units; without a structure, parameter name -> scores of its weights.
            density: share of the units to keep, in (0, 1].
            within: key -> which units may be kept; None for all.
            outputs: keys of the output layers; None for the last of ``scores``.
            shapes: key -> shapes of the parameters that its units lie in; None for the scores' own.
        """
        ...


@dataclass(frozen=True)
class Global:
    """All weights compete; the total is exactly ``kept(all weights, density)``.

    A layer of small weights can lose everything that way (layer collapse), so every layer keeps at least its
    floor, and the other layers give up the difference. The floor follows the density: an absolute share (say
    1% of a layer) would be impossible below that density and would flatten the allocation long before.

    Attributes:
        floor: the least that a layer keeps. A float is a share of what the layer would keep if all had the
            same density, rounded up: the default 0.1 lets no layer become more than ten times sparser than
            the network. An int is a number of weights. Either way at least one weight, except that 0 turns
            the floor off. A layer is never asked for more than it has left in ``within``.

    References: Frankle and Carbin, 2019, arXiv:1803.03635, section 4 (global pruning of deep networks);
    Tanaka et al., Pruning neural networks without any data, 2020, arXiv:2006.05467 (layer collapse).
    """

    floor: int | float = 0.1

    def __post_init__(self):
        share = isinstance(self.floor, float)
        if isinstance(self.floor, bool) or not (0 <= self.floor <= 1 if share else self.floor >= 0):
            raise ValueError(
                f"floor is {self.floor!r}: give a float from 0 to 1 (share of a layer's fair part) or an int "
                "from 0 up (number of weights)"
            )

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Counts of the global top k, with layers below their floor lifted to it; ``outputs`` plays no part.

        Raises:
            ValueError: if the floors together exceed the total, or ``within`` has less left than that total.
        """
        sizes, left, total = _asked(scores, density, within)
        floors = {name: min(self._floor_of(size, density), left[name]) for name, size in sizes.items()}
        if sum(floors.values()) > total:
            raise ValueError(
                f"density {density} keeps {total}, but the floor {self.floor!r} asks for "
                f"{sum(floors.values())} over {len(floors)} layers: raise the density or lower the floor"
            )
        lifted: dict[str, int] = {}
        while True:
            free = {name: score for name, score in scores.items() if name not in lifted}
            chosen = keep_top_k(free, total - sum(lifted.values()), within)
            counts = {name: int(mask.sum()) for name, mask in chosen.items()}
            short = {name: floors[name] for name, count in counts.items() if count < floors[name]}
            if not short:
                break
            for name, floor in short.items():
                _warn(f"'{name}' would have kept {counts[name]} of {sizes[name]}; it keeps {floor}")
            lifted |= short
        counts |= lifted
        for name, count in counts.items():
            if count == 0:
                _warn(f"'{name}' keeps none of its {sizes[name]}, so nothing passes through it")
        return {name: counts[name] for name in scores}

    def _floor_of(self, size: int, density: float) -> int:
        if self.floor == 0:
            return 0
        if isinstance(self.floor, int):
            return min(self.floor, size)
        return max(1, math.ceil(Fraction(repr(float(self.floor))) * kept(size, density)))


@dataclass(frozen=True)
class Uniform:
    """The same density in every layer, and exactly ``kept(all weights, density)`` in total.

    Rounding every layer by itself would miss the total by up to half a weight per layer, so the places are
    divided like seats in a parliament (Webster: count = size * x, halves up, with the one x that gives the
    total; ties go to the first layer). Every layer is within about one weight of its own ``kept``, and counts
    never grow as the density falls.
    """

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Counts proportional to the layers' sizes; ``outputs`` plays no part.

        Raises:
            ValueError: if there are fewer places than layers, or ``within`` has less left in a layer than its
                count.
        """
        sizes, left, total = _asked(scores, density, within)
        counts = _apportioned(sizes, total, density, sizes, sizes)
        _check_room(counts, left, density)
        return counts


@dataclass(frozen=True)
class ERK:
    """Densities in proportion to (sum of a layer's dimensions) / (their product): Erdos-Renyi-Kernel.

    Layers of few weights stay denser. Where a density would be above 1, or above what a layer has left in ``within``,
    the layer keeps all of that, and the rest is divided over the others; the total is exactly ``kept(all weights,
    density)``, apportioned as in :class:`Uniform`. A key of several matrices has the density that they would have
    together.

    Reference: Evci et al., Rigging the lottery: making all tickets winners, 2020, arXiv:1911.11134, section 3 (1).
    """

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Counts in proportion to units * density of the layer; ``outputs`` plays no part.

        Raises:
            ValueError: if there are fewer places than layers, or ``within`` has less left than the total.
        """
        return _erdos_renyi(scores, density, within, shapes, sum)


@dataclass(frozen=True)
class ErdosRenyi:
    """As :class:`ERK` with the number of outputs and inputs in place of all dimensions: kernels do not count.

    The density is in proportion to (n_out + n_in) / (n_out * n_in), for a matrix the same as in :class:`ERK`.

    Reference: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018,
    arXiv:1707.04780, equation 1; for convolutions Evci et al., 2020, arXiv:1911.11134, section 3 (1).
    """

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Counts, and errors, as in :class:`ERK`."""
        return _erdos_renyi(scores, density, within, shapes, _neurons)


@dataclass(frozen=True)
class LayerwiseAsPaper:
    """Every layer pruned to the density, the output layer at its own slower rate.

    A round prunes a share ``rate`` = p of every layer and ``output_rate`` * p of the output layer. After n
    rounds

        density = (1 - p)^n,    output density = (1 - output_rate * p)^n,    n = log(density) / log(1 - p)

    where n need not be whole. Each layer keeps ``kept(size, its density)``; the total is the sum of these, so
    the whole network is slightly denser than ``density``, as in the paper (LeNet-300-100 at rate 0.2: 51.3%,
    21.1%, 3.6%).

    Attributes:
        output_rate: the output layer's rate over the others', from 0 (left dense) to 1 (like the others).
        rate: the share pruned per round, in (0, 1); give the schedule's own.

    Reference: Frankle and Carbin, 2019, arXiv:1803.03635, section 2.
    """

    output_rate: float = 0.5
    rate: float = 0.2

    def __post_init__(self):
        if not 0 <= self.output_rate <= 1:
            raise ValueError(f"output_rate is {self.output_rate!r}: give the share of the rate, from 0 to 1")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate!r}: give the share pruned per round, above 0 and below 1")

    def output_density(self, density: float) -> float:
        """The output layer's density when the other layers are at ``density``."""
        rounds = math.log(check_density(density)) / math.log1p(-self.rate)
        if abs(rounds - round(rounds)) < 1e-9:
            rounds = round(rounds)  # whole rounds are computed exactly, as `geometric` does
        slowed = Fraction(repr(float(self.output_rate))) * Fraction(repr(float(self.rate)))
        return float((1 - slowed) ** rounds)

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        density: float,
        *,
        within: Mapping[str, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        shapes: Shapes | None = None,
    ) -> dict[str, int]:
        """Counts layer by layer; ``outputs`` names the output layers, None is the last of ``scores``.

        Raises:
            ValueError: if ``within`` has less left in a layer than its count, or an output is not among the
                scores.
        """
        sizes = _sizes(scores)
        slow = {list(sizes)[-1]} if outputs is None else set(outputs)
        if not slow <= sizes.keys():
            raise ValueError(f"outputs {sorted(slow - sizes.keys())} are not among the scores: {list(sizes)}")
        fair = {n: kept(s, self.output_density(density) if n in slow else density) for n, s in sizes.items()}
        counts = {name: max(1, count) for name, count in fair.items()}
        _warn_of_rescue(sizes, fair)
        _check_room(counts, _left(scores, within), density)
        return counts


ALLOCATIONS = {
    "global": Global,
    "uniform": Uniform,
    "layerwise": LayerwiseAsPaper,
    "erk": ERK,
    "erdos_renyi": ErdosRenyi,
}


def _erdos_renyi(
    scores: Mapping[str, Tensor],
    density: float,
    within: Mapping[str, Tensor] | None,
    shapes: Shapes | None,
    ends: Callable[[Sequence[int]], int],
) -> dict[str, int]:
    """Counts where the density of a layer is in proportion to ``ends(shape) / prod(shape)``; a kernel multiplies both
    for :class:`ErdosRenyi`.
    """
    sizes, left, total = _asked(scores, density, within)
    lying = {key: [score.shape] for key, score in scores.items()} if shapes is None else shapes
    weights = {
        key: size * Fraction(sum(map(ends, lying[key])), sum(map(math.prod, lying[key]))) for key, size in sizes.items()
    }
    return _apportioned(weights, total, density, left, sizes)


def _neurons(shape: Sequence[int]) -> int:
    """(outputs + inputs) times the kernel, so that over all dimensions it is over outputs times inputs."""
    return sum(shape[:2]) * math.prod(shape[2:])


def _apportioned(
    weights: Mapping[str, int | Fraction],
    total: int,
    density: float,
    room: Mapping[str, int],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """``total`` places divided in proportion to ``weights``, from 1 to ``room`` for each, like seats in a parliament.

    Webster: count = weight * x, halves up, held between its bounds, with the one x that gives the total; ties go to
    the first. So counts never grow as the total falls.
    """
    if total < sum(map(bool, room.values())):
        raise ValueError(
            f"density {density} keeps {total}, too few for one in each of {len(room)} layers: raise the density"
        )
    scale = _scale(weights, total, room)
    fair = {name: math.floor(weight * scale + Fraction(1, 2)) for name, weight in weights.items()}
    counts = {name: min(max(1, count), room[name]) for name, count in fair.items()}
    index = {name: position for position, name in enumerate(weights)}
    while (missing := total - sum(counts.values())) != 0:
        # A layer's j-th place has priority weight / (2j - 1); the highest priorities are taken.
        step = 1 if missing > 0 else 0
        movable = [n for n in weights if (counts[n] < room[n] if step else counts[n] > 1)]
        rank = {n: (Fraction(weights[n]) / (2 * (counts[n] + step) - 1), -index[n]) for n in movable}
        if step:
            counts[max(movable, key=rank.__getitem__)] += 1
        else:
            counts[min(movable, key=rank.__getitem__)] -= 1
    _warn_of_rescue(sizes, {name: count for name, count in fair.items() if room[name]})
    return counts


def _scale(weights: Mapping[str, int | Fraction], total: int, room: Mapping[str, int]) -> Fraction:
    """The x for which the sum of weight * x, held to the rooms, is the total."""
    full: set[str] = set()
    while free := weights.keys() - full:
        scale = Fraction(total - sum(room[n] for n in full)) / sum(weights[n] for n in free)
        if not (over := {n for n in free if weights[n] * scale > room[n]}):
            return scale
        full |= over
    return Fraction(0)


def _sizes(scores: Mapping[str, Tensor]) -> dict[str, int]:
    if not scores:
        raise ValueError("there are no layers to divide the density over: give at least one tensor of scores")
    return {name: score.numel() for name, score in scores.items()}


def _left(scores: Mapping[str, Tensor], within: Mapping[str, Tensor] | None) -> dict[str, int]:
    return _sizes(scores) if within is None else {name: int(within[name].sum()) for name in scores}


def _asked(
    scores: Mapping[str, Tensor], density: float, within: Mapping[str, Tensor] | None
) -> tuple[dict[str, int], dict[str, int], int]:
    """Sizes, what is left of them in ``within``, and how many of all the density keeps, which must be there."""
    sizes, left = _sizes(scores), _left(scores, within)
    total, room = kept(sum(sizes.values()), density), sum(left.values())
    if total == 0:
        raise ValueError(f"density {density} keeps none of {room}: raise it")
    if total > room:
        raise ValueError(
            f"density {density} keeps {total}, but `within` has only {room} left, and what is pruned "
            "never comes back: give a density at most that of `within`"
        )
    return sizes, left, total


def _check_room(counts: Mapping[str, int], left: Mapping[str, int], density: float) -> None:
    for name, count in counts.items():
        if count > left[name]:
            raise ValueError(
                f"density {density} keeps {count} of '{name}', but `within` has only {left[name]} left, where what is "
                "pruned never comes back, or the structure allows no more: lower it, or use the allocation that made "
                "`within`"
            )


def _warn_of_rescue(sizes: Mapping[str, int], fair: Mapping[str, int]) -> None:
    for name, count in fair.items():
        if count == 0:
            _warn(f"'{name}' would have kept 0 of {sizes[name]}; it keeps 1")


def _warn(what: str) -> None:
    """Warn at the line that called into this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "prune":
        level, frame = level + 1, frame.f_back
    warnings.warn(f"layer collapse: {what}", stacklevel=level)
