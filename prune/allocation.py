"""How many weights each layer keeps, counted from the layer's original size at every level.

All allocations keep at least one weight per layer (a layer with none cuts the network in two) unless their floor is 0,
warn when that made a difference, and give counts that fall with the density, so that levels nest. Under a structure
"weights" are its units, and "layers" the keys that they belong to.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

from torch import Tensor

from prune.schedule import check_density, kept
from prune.topk import keep_top_k


@dataclass(frozen=True, eq=False)
class Layers:
    """What a density is divided over.

    Attributes:
        scores: key -> scores of its units; without a structure, parameter name -> scores of its weights.
        density: share of the units to keep, in (0, 1].
        within: key -> which units may be kept, bool of the scores' shape; None for all.
        outputs: keys of the output layers; None for the last of ``scores``.
        shapes: key -> shapes of the parameters that its units are in; None for the scores' own.

    Raises:
        ValueError: if there is no layer.
    """

    scores: Mapping[str, Tensor]
    density: float
    within: Mapping[str, Tensor] | None = None
    outputs: Collection[str] | None = None
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None

    def __post_init__(self):
        if not self.scores:
            raise ValueError("there are no layers to divide the density over: give at least one tensor of scores")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Key -> original number of units."""
        return {name: score.numel() for name, score in self.scores.items()}

    @cached_property
    def available(self) -> dict[str, int]:
        """Key -> number of units that may be kept."""
        return self.sizes if self.within is None else {name: int(self.within[name].sum()) for name in self.scores}

    @cached_property
    def total(self) -> int:
        """``kept(all units, density)``.

        Raises:
            ValueError: if it is 0, or more than may be kept.
        """
        total, available = kept(sum(self.sizes.values()), self.density), sum(self.available.values())
        if total == 0:
            raise ValueError(f"density {self.density} keeps none of {available}: raise it")
        if total > available:
            raise ValueError(
                f"density {self.density} keeps {total}, but `within` has only {available} left, and what is pruned "
                "never comes back: give a density at most that of `within`"
            )
        return total

    def check_available(self, counts: Mapping[str, int]) -> None:
        """Refuse counts of which a layer has fewer units left.

        Raises:
            ValueError: naming the layer.
        """
        for name, count in counts.items():
            if count > self.available[name]:
                raise ValueError(
                    f"density {self.density} keeps {count} of '{name}', but `within` has only {self.available[name]} "
                    "left, where what is pruned never comes back, or the structure allows no more: lower it, or use "
                    "the allocation that made `within`"
                )


class Allocation(Protocol):
    """Divides a density over layers."""

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Key -> number of units to keep, in the order of ``layers.scores``.

        Raises:
            ValueError: if the density cannot be met.
        """
        ...


@dataclass(frozen=True)
class Global:
    """All weights compete: layers of small scores become sparser than others.

    Formula: count_l = max(floor_l, number of layer l's scores among the k highest of all), k = ``kept(all weights,
    density)`` exactly; layers above their floor give up what the others gain.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635, section 4; for the collapse of
    layers Tanaka et al., Pruning neural networks without any data, 2020, arXiv:2006.05467.

    When to use: the default, best for deep networks with magnitudes or losses as scores. Not for scores whose scale
    differs between layers (``wanda``).

    The papers' global pruning has no floor: give ``Global(floor=0)``, in a recipe ``allocation: {floor: 0}``, to get
    their masks. With the default a layer is lifted only where its scores are far below the others', and every layer
    that is lifted is named in a warning. It is the default because a layer that keeps almost nothing cuts off what the
    others keep; at high sparsity the masks differ (ResNet-20 at density 1 %: a tenth of the weights).

    Attributes:
        floor: the least that a layer keeps. A float is a share of what the layer would keep if all had the
            same density, rounded up: the default 0.1 lets no layer become more than ten times sparser than
            the network. An int is a number of weights. Either way at least one weight, except that 0 turns
            the floor off. A layer never keeps more than it has left in ``within``.
    """

    floor: int | float = 0.1

    def __post_init__(self):
        share = isinstance(self.floor, float)
        if isinstance(self.floor, bool) or not (0 <= self.floor <= 1 if share else self.floor >= 0):
            raise ValueError(
                f"floor is {self.floor!r}: give a float from 0 to 1 (share of what the layer would keep at the same "
                "density) or an int from 0 up (number of weights)"
            )

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Counts of the global top k, with layers below their floor lifted to it.

        Raises:
            ValueError: if the floors together exceed the total, or ``within`` has less left than that total.
        """
        return {name: int(mask.sum()) for name, mask in self.select(layers).items()}

    def select(self, layers: Layers) -> dict[str, Tensor]:
        """The units that it keeps, key -> bool of the scores' shape: of every key the highest scores, ties by index.

        The layers that compete are selected while they are counted, so this costs no more than the counts.

        Raises:
            ValueError: as a call.
        """
        total, sizes = layers.total, layers.sizes
        floors = {n: min(self._floor_of(size, layers.density), layers.available[n]) for n, size in sizes.items()}
        if sum(floors.values()) > total:
            raise ValueError(
                f"density {layers.density} keeps {total}, but the floor {self.floor!r} needs "
                f"{sum(floors.values())} over {len(floors)} layers: raise the density or lower the floor"
            )
        lifted: dict[str, int] = {}
        while True:  # lifting a layer takes weights from the others, which may put one of them below its floor
            free = {name: score for name, score in layers.scores.items() if name not in lifted}
            masks = keep_top_k(free, total - sum(lifted.values()), layers.within)
            counts = {name: int(mask.sum()) for name, mask in masks.items()}
            short = {name: floors[name] for name, count in counts.items() if count < floors[name]}
            if not short:
                break
            for name, floor in short.items():
                _warn(
                    f"'{name}' would have kept {counts[name]} of {sizes[name]}; it keeps {floor}, by floor {self.floor}"
                )
            lifted |= short
        for name, count in counts.items():
            if count == 0:
                _warn(f"'{name}' keeps none of its {sizes[name]}, so nothing passes through it")
        for name, count in lifted.items():
            masks |= keep_top_k({name: layers.scores[name]}, count, layers.within)
        return {name: masks[name] for name in layers.scores}

    def _floor_of(self, size: int, density: float) -> int:
        # The floor follows the density: a fixed share (1% of a layer) would be impossible below that density, and would
        # make the allocation uniform long before.
        if self.floor == 0:
            return 0
        if isinstance(self.floor, int):
            return min(self.floor, size)
        return max(1, math.ceil(Fraction(repr(float(self.floor))) * kept(size, density)))


@dataclass(frozen=True)
class Uniform:
    """The same density in every layer.

    Formula: count_l = round(size_l * x), halves up, with the one x that gives ``kept(all weights, density)`` in total
    (Webster's apportionment). Rounding every layer alone would miss the total by up to half a weight per layer.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878.

    When to use: as the baseline, or for scores whose scale differs between layers.
    """

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Counts in proportion to the layers' sizes.

        Raises:
            ValueError: if the total is less than one per layer, or ``within`` has less left in a layer than its count.
        """
        counts = _apportion(layers.sizes, layers, layers.sizes)
        layers.check_available(counts)
        return counts


@dataclass(frozen=True)
class ERK:
    """Erdos-Renyi-Kernel: small layers stay denser.

    Formula: density_l in proportion to (sum of the dimensions of l) / (their product), kernel included; at most 1, or
    what the layer has left in ``within``, and the rest divided over the others. The total is exactly ``kept(all
    weights, density)``, apportioned as in :class:`Uniform`. A key of several matrices has the density that they would
    have together.

    Source: Evci et al., Rigging the lottery: making all tickets winners, 2020, arXiv:1911.11134, section 3 (1).

    When to use: convolutional networks, dynamic sparsity, and random masks, which no score guides.
    """

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Counts in proportion to size * density of the layer.

        Raises:
            ValueError: if the total is less than one per layer, or ``within`` has less left than the total.
        """
        return _erdos_renyi(layers, sum)


@dataclass(frozen=True)
class ErdosRenyi:
    """Erdos-Renyi: as :class:`ERK` without the kernel; for matrices the same.

    Formula: density_l in proportion to (n_out + n_in) / (n_out * n_in).

    Source: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018,
    arXiv:1707.04780, equation 1; for convolutions Evci et al., 2020, arXiv:1911.11134, section 3 (1).

    When to use: to reproduce SET.
    """

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Counts, and errors, as in :class:`ERK`."""
        # (outputs + inputs) times the kernel, so that over the product of all dimensions the kernel cancels.
        return _erdos_renyi(layers, lambda shape: sum(shape[:2]) * math.prod(shape[2:]))


@dataclass(frozen=True)
class LayerwiseAsPaper:
    """Every layer at the density, the output layer pruned at its own slower rate.

    Formula: density = (1 - p)^n and output density = (1 - output_rate * p)^n, with p = ``rate`` and n = log(density) /
    log(1 - p) rounds, which need not be whole. Each layer keeps ``kept(size, its density)``.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635, section 2.

    When to use: to reproduce the paper's small networks (LeNet-300-100, Conv-2 to Conv-6). The whole network is then
    slightly denser than ``density`` (LeNet-300-100 at rate 0.2: 51.3%, 21.1%, 3.6%).

    Attributes:
        output_rate: the output layer's rate over the others', from 0 (left dense) to 1 (like the others).
        rate: the share pruned per round, in (0, 1); give the schedule's own.
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

    def __call__(self, layers: Layers) -> dict[str, int]:
        """Counts layer by layer.

        Raises:
            ValueError: if ``within`` has less left in a layer than its count, or an output is not among the
                scores.
        """
        sizes, density = layers.sizes, layers.density
        outputs = {list(sizes)[-1]} if layers.outputs is None else set(layers.outputs)
        if not outputs <= sizes.keys():
            raise ValueError(f"outputs {sorted(outputs - sizes.keys())} are not among the scores: {list(sizes)}")
        exact = {n: kept(s, self.output_density(density) if n in outputs else density) for n, s in sizes.items()}
        counts = {name: max(1, count) for name, count in exact.items()}
        _warn_if_raised(sizes, exact)
        layers.check_available(counts)
        return counts


ALLOCATIONS = {
    "global": Global,
    "uniform": Uniform,
    "layerwise": LayerwiseAsPaper,
    "erk": ERK,
    "erdos_renyi": ErdosRenyi,
}


def _erdos_renyi(layers: Layers, numerator: Callable[[Sequence[int]], int]) -> dict[str, int]:
    """Counts where the density of a layer is in proportion to ``numerator(shape) / prod(shape)``."""
    shapes = {key: [score.shape] for key, score in layers.scores.items()} if layers.shapes is None else layers.shapes
    weights = {
        key: size * Fraction(sum(map(numerator, shapes[key])), sum(map(math.prod, shapes[key])))
        for key, size in layers.sizes.items()
    }
    return _apportion(weights, layers, layers.available)


def _apportion(weights: Mapping[str, int | Fraction], layers: Layers, limits: Mapping[str, int]) -> dict[str, int]:
    """``layers.total`` divided in proportion to ``weights``, from 1 to ``limits`` for each, like seats in a parliament.

    Webster: count = weight * x, halves up, held between its bounds, with the one x that gives the total; ties go to
    the first. So counts never grow as the total falls, which makes levels nest.
    """
    total = layers.total
    if total < sum(map(bool, limits.values())):
        raise ValueError(
            f"density {layers.density} keeps {total}, too few for one in each of {len(limits)} layers: raise the "
            "density"
        )
    scale = _scale(weights, total, limits)
    exact = {name: math.floor(weight * scale + Fraction(1, 2)) for name, weight in weights.items()}
    counts = {name: min(max(1, count), limits[name]) for name, count in exact.items()}
    index = {name: position for position, name in enumerate(weights)}
    while (missing := total - sum(counts.values())) != 0:
        # The j-th unit of a layer has priority weight / (2j - 1); the highest priorities are kept.
        step = 1 if missing > 0 else 0
        movable = [n for n in weights if (counts[n] < limits[n] if step else counts[n] > 1)]
        rank = {n: (Fraction(weights[n]) / (2 * (counts[n] + step) - 1), -index[n]) for n in movable}
        if step:
            counts[max(movable, key=rank.__getitem__)] += 1
        else:
            counts[min(movable, key=rank.__getitem__)] -= 1
    _warn_if_raised(layers.sizes, {name: count for name, count in exact.items() if limits[name]})
    return counts


def _scale(weights: Mapping[str, int | Fraction], total: int, limits: Mapping[str, int]) -> Fraction:
    """The x for which the sum of weight * x, held to the limits, is the total."""
    full: set[str] = set()
    while free := weights.keys() - full:
        scale = Fraction(total - sum(limits[n] for n in full)) / sum(weights[n] for n in free)
        if not (over := {n for n in free if weights[n] * scale > limits[n]}):
            return scale
        full |= over
    return Fraction(0)


def _warn_if_raised(sizes: Mapping[str, int], exact: Mapping[str, int]) -> None:
    """Warn of layers that keep one weight where the formula gives none."""
    for name, count in exact.items():
        if count == 0:
            _warn(f"'{name}' would have kept 0 of {sizes[name]}; it keeps 1")


def _warn(what: str) -> None:
    """Warn at the line that called into this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "prune":
        level, frame = level + 1, frame.f_back
    warnings.warn(f"layer collapse: {what}", stacklevel=level)
