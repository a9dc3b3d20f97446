"""Which weights of a model to keep at a density."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from prune.allocation import ALLOCATIONS, Allocation, Global, Layers
from prune.criteria import CRITERIA, Criterion, Group, seeded
from prune.masks import Masks
from prune.masks.enforce import masked_parameters
from prune.pruner.dense import tell
from prune.pruner.norms import check_kept, keep_norms, lifted, needed
from prune.pruner.scope import (
    Patterns,
    Scope,
    check_fits,
    check_weight,
    matching,
    output_weight,
    patterns_of,
)
from prune.schedule import check_density, exponential
from prune.structures import STRUCTURES, Layout, Structure, structure_named
from prune.structures.layout import best_of_each
from workbench.distributed.ranks import all_gather, world_size
from workbench.messages import nearest
from workbench.models.matrices import Matrix

Scores = Mapping[str, Tensor]


class Axes(NamedTuple):
    """The three axes of a :class:`Pruner` as objects."""

    criterion: Criterion
    structure: Structure
    allocation: Allocation


@dataclass(frozen=True)
class Pruner:
    """Chooses which weights of a model to keep; changes nothing in the model.

    Each axis takes a name or an instance: ``allocation="global"`` or ``allocation=Global(floor=0.05)``. In a recipe an
    instance is ``{class_path: prune.allocation.LayerwiseAsPaper, init_args: {output_rate: 0}}``; of the global
    allocation ``{floor: 0.05}`` is enough.

    Args:
        criterion: How a weight is scored; the highest scores stay. "magnitude" (absolute value), "random" (the
            control), "snip", "grasp", "taylor", "movement" (gradients of the loss on training batches), "synflow" (the
            shape of one batch), "wanda" (inputs of layers on training batches), or a ``Criterion``.
        structure: Which weights are kept or pruned together. "unstructured" (single weights), "2:4" (or any n:m),
            "4x4" (or any block of rows x columns), "channel", "head", "ffn", "balanced", or a ``Structure``. "coupled"
            (channels with everything that depends on them, which `shrink` can remove) only in the job `hunt`;
            elsewhere give ``Coupled(example_inputs)``.
        allocation: How the density is divided over layers. "global" (all weights compete, but no layer becomes more
            than ten times sparser than the network; ``Global(floor=0)`` turns that off), "uniform", "layerwise" (as
            uniform, the output layer at half the rate), "erk", "erdos_renyi" (small layers stay denser), or an
            ``Allocation``.
        include: Name patterns (``fnmatch``, such as "layers.*.weight") or types of layers; only prunable weights that
            match one are pruned. None for all (:func:`prunable`).
        exclude: Name patterns or types of layers; weights that match one are not pruned.
        output: Name pattern of the output layers, which "layerwise" prunes more slowly. None for the last Linear or
            Conv layer in definition order, if that is pruned (a head tied to an embedding is not).
        seed: Seed of the criterion "random", 0 or more; the scores depend on it and on the parameter's name only.
        smallest: Weight tensors with fewer entries than this are not pruned. 1 excludes none.
        group: How a unit of several weights is scored. None is the criterion's own: of "snip", "taylor" and "movement"
            "sum", as their papers prune units, the score of a gate on the whole unit, (sum of g * w)^2 for "taylor";
            of all others "mean", the mean of its weights' scores. Of a criterion without gradients "sum" is the sum of
            its weights' scores: of magnitudes their L1 norm.

    Raises:
        TypeError: If an axis is neither a name nor an instance.
        ValueError: If a name is unknown.

    References: Frankle and Carbin, 2019, arXiv:1803.03635 (iterative magnitude pruning); Frankle et al.,
    2020, arXiv:1912.05671 (with rewinding to an early step).
    """

    criterion: str | Criterion = "magnitude"
    structure: str | Structure = "unstructured"
    allocation: str | Global | Allocation = "global"
    include: Patterns = None
    exclude: Patterns = None
    output: str | None = None
    seed: int = 0
    smallest: int = 1
    group: Group | None = None

    def __post_init__(self):
        object.__setattr__(self, "include", patterns_of(self.include))
        object.__setattr__(self, "exclude", patterns_of(self.exclude))
        if self.group not in (None, *get_args(Group)):
            raise ValueError(f"group is {self.group!r}: give one of {list(get_args(Group))}, or None")
        _ = self.axes  # refuses unknown names here rather than after hours of training

    @cached_property
    def axes(self) -> Axes:
        """Criterion, structure and allocation as objects; the fields keep what was given, as recipes are written."""
        allocations = {name: make() for name, make in ALLOCATIONS.items()}
        structure = self.structure
        if isinstance(structure, str):
            structure = _Untraced() if structure == "coupled" else structure_named(structure)
        return Axes(
            _parsed("criterion", self.criterion, CRITERIA),
            _parsed("structure", structure, STRUCTURES),
            _parsed("allocation", self.allocation, allocations),
        )

    def __call__(
        self,
        model: nn.Module,
        density: float,
        within: Masks | None = None,
        *,
        loader: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        scores: Scores | None = None,
        unit_scores: Scores | None = None,
    ) -> Masks:
        """Masks that keep the share ``density`` of the prunable units.

        A criterion that prunes in rounds goes from the density of ``within`` to this one by equal ratios, and scores
        the model anew in each round, with pruned weights set to zero. In a process group every rank must call a pruner
        that looks at data or is given scores: rank 0 decides, and all ranks get its masks.

        Args:
            model: weights are read, in fp32 or better; the model is left as it was.
            density: share to keep, in (0, 1], of the *original* number of units, at every level; the count is
                ``schedule.kept(total, density)`` (by key for ``"layerwise"``). Units are single weights unless the
                structure groups them.
            within: the masks of the level before: the result is nested in them, scores at pruned positions
                are ignored, and density 1 returns them unchanged.
            loader: batches, for a criterion that looks at data; read once a round.
            loss: ``loss(model, batch)``, a scalar, the mean over the batch, for a criterion that needs one.
            scores: replace the criterion's: parameter name -> scores of its shape, such as those summed up while
                training. A unit has their mean, or with ``group="sum"`` their sum.
            unit_scores: replace them: key of :meth:`gates` -> scores of its units.

        Returns:
            Masks by parameter name in definition order, on the parameters' devices, of the weights that ``scope``
            gives.

        Raises:
            ValueError: if the density is out of range or cannot be met, nothing is prunable, a pattern matches
                nothing, a weight is of a kind that cannot be ranked (meta, sparse, quantised) or has NaN or infinite
                values, ``within`` or ``scores`` are not for these parameters, or the criterion needs data that is not
                given.
        """
        check_density(density)
        scope = self._scope(model)
        for name, weight in scope.prunable.items():
            check_weight(name, weight)
        tell(model, scope.dense)
        if within is not None:
            scope.check_masks(within)
        if density == 1:
            return Masks.ones(scope.weights) if within is None else within
        outputs = self._outputs(model, scope)

        def select(units: Scores, density: float, within: Masks | None) -> Masks:
            return self._select(scope, outputs, units, density, within)

        criterion = self.axes.criterion
        if unit_scores is not None:
            given = {key: each.numel() for key, each in unit_scores.items()}
            if given != scope.layout.units:
                raise ValueError(
                    f"`unit_scores` are of {given}, but the units of {self.structure} are {scope.layout.units}"
                )
            return _agreed(select(unit_scores, density, within))
        if scores is not None:
            check_fits("scores", scores, scope.weights)
            return _agreed(select(scope.layout.pool(scores, within, self.group or "mean"), density, within))
        if not criterion.needs_loader:
            units = scope.layout.pool(self._score_weights(scope.matrices), within, self._group)
            return select(units, density, within)
        data = self._check_data(loader, loss)
        start = 1.0 if within is None else max(density, _unit_density(scope.layout, within))
        for step in range(1, criterion.rounds):
            target = float(min(exponential(step / criterion.rounds, density, start), scope.layout.densest))
            scores = self._score_model(model, scope, within, data)
            with warnings.catch_warnings(), suppress(ValueError):  # a density that cannot be met on the way is skipped
                warnings.simplefilter("ignore")
                within = _agreed(select(scores, target, within))
        return _agreed(select(self._score_model(model, scope, within, data), density, within))

    def scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that masks of this pruner are for, by first name, in definition order.

        Raises:
            ValueError: as ``prunable``; or if the structure cannot divide a weight, or covers none that a pattern
                includes.
        """
        return self._scope(model).weights

    def check(self, model: nn.Module, *densities: float) -> None:
        """Refuse densities that are out of range or above what the structure allows, before hours of training.

        Raises:
            ValueError: as a call; or naming the density that is above what the structure allows.
        """
        scope = self._scope(model)
        tell(model, scope.dense)
        if self.axes.criterion.check is not None:
            self.axes.criterion.check(model, scope.weights)
        for density in densities:
            check_density(density)
            if density < 1:
                scope.check_density(density)

    def densest(self, model: nn.Module) -> float:
        """The highest density below 1 that the structure allows, n/m for N:M; 1 where every density is allowed."""
        return float(self._scope(model).layout.densest)

    def gates(self, model: nn.Module) -> Layout | None:
        """The units, if they are scored by gates: to sum up ``criterion.online`` of them over training steps.

        None if units are single weights, or their scores are made of their weights' scores.
        """
        layout = self._scope(model).layout
        return layout if self._scores_gates(layout) else None

    def _scope(self, model: nn.Module) -> Scope:
        include, exclude = patterns_of(self.include), patterns_of(self.exclude)
        return Scope(model, self.axes.structure, include, exclude, self.smallest)

    def _outputs(self, model: nn.Module, scope: Scope) -> list[str]:
        """The keys of the output layers."""
        if self.output is not None:
            names = matching("output", (self.output,), {name: [name] for name in scope.prunable})
        else:
            last = output_weight(model)
            names = [name for name, weight in scope.prunable.items() if weight is last]
        return [key for name in names for key, _ in scope.layout.members.get(name, ())]

    def _check_data(self, loader: Any, loss: Any) -> tuple[Any, ...]:
        """The arguments that the criterion needs beside model and weights."""
        criterion = self.axes.criterion
        needed = {"loader": loader, "loss": loss} if criterion.needs_loss else {"loader": loader}
        if missing := [argument for argument, value in needed.items() if value is None]:
            what = {"loader": "loader=, an iterable of batches", "loss": "loss=, a function of model and batch"}
            raise ValueError(
                f"criterion '{criterion.name}' looks at data: call the pruner with "
                f"{', and '.join(what[argument] for argument in missing)}; or with scores= of your own"
            )
        if criterion.rounds > 1 and isinstance(loader, Iterator):
            raise ValueError(
                f"criterion '{criterion.name}' reads the loader {criterion.rounds} times, and an iterator can be read "
                "once: give a list or a DataLoader"
            )
        return tuple(needed.values())

    def _score_weights(self, weights: Mapping[str, Matrix]) -> dict[str, Tensor]:
        """Scores of what the layers multiply by: of ``weight_norm`` and the like not the parameter itself."""
        criterion = self.axes.criterion
        if criterion.needs_generator:
            return {n: criterion.score(each.product(), seeded(self.seed, n)) for n, each in weights.items()}
        return {name: criterion.score(each.product()) for name, each in weights.items()}

    @property
    def _group(self) -> Group:
        return self.axes.criterion.group if self.group is None else self.group

    def _score_model(
        self, model: nn.Module, scope: Scope, within: Masks | None, data: tuple[Any, ...]
    ) -> dict[str, Tensor]:
        """Scores of units."""
        layout, weights, criterion = scope.layout, scope.weights, self.axes.criterion
        gates = self._scores_gates(layout)
        with _masked(model, within):
            if gates:
                return criterion.score(model, weights, *data, units=partial(layout.pool, form="sum"))
            scores = criterion.score(model, weights, *data)
        check_fits("scores", scores, weights)
        return layout.pool(scores, within, self._group)

    def _scores_gates(self, layout: Layout) -> bool:
        return self._group == "sum" and self.axes.criterion.gates and layout.groups_weights

    def _select(
        self, scope: Scope, outputs: Collection[str], units: Scores, density: float, within: Masks | None
    ) -> Masks:
        scope.check_density(density)
        layout = scope.layout
        unpruned = layout.unpruned(within)
        units = keep_norms(scope.matrices, layout, units, unpruned)
        candidates = layout.candidates(units, unpruned)
        layers, allocation = Layers(units, density, candidates, outputs, scope.shapes), self.axes.allocation
        if isinstance(allocation, Global) and layout.select is best_of_each:
            chosen = allocation.select(layers)  # the same units as by its counts, in one pass over the scores
        else:
            counts = lifted(allocation(layers), needed(scope.matrices, layout))
            chosen = layout.select(units, counts, candidates)
        masks = layout.spread(chosen, within)
        check_kept(scope.matrices, masks)
        return Masks({name: mask.to(scope.weights[name].device) for name, mask in masks.items()})


@dataclass(frozen=True)
class _Untraced:
    """The structure "coupled" without the example inputs that a network is traced with: `hunt` replaces it."""

    def layout(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Layout:
        return structure_named("coupled").layout(model, weights)  # refuses, with what to give


def _agreed(masks: Masks) -> Masks:
    """The masks of rank 0, on every rank."""
    if world_size() == 1:
        return masks
    shapes = all_gather([(name, tuple(mask.shape)) for name, mask in masks.items()])
    if any(each != shapes[0] for each in shapes):
        raise RuntimeError("ranks hold masks of different parameters: give all of them the same model")
    sent = [masks.state_dict()]
    torch.distributed.broadcast_object_list(sent, src=0)
    return Masks({name: mask.to(masks[name].device) for name, mask in Masks.from_state_dict(sent[0]).items()})


@contextmanager
def _masked(model: nn.Module, masks: Masks | None) -> Iterator[None]:
    """Inside, masked weights are zero; afterwards they are what they were."""
    if masks is None or masks.is_applied_to(model):
        yield
        return
    weights = masked_parameters(masks, model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        masks.apply(model)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


def _unit_density(layout: Layout, within: Masks) -> float:
    unpruned = layout.unpruned(within) or {}
    return sum(int(mask.sum()) for mask in unpruned.values()) / sum(layout.units.values())


def _parsed(axis: str, value: Any, table: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        if value not in table:
            raise ValueError(f"unknown {axis} {value!r}{nearest(value, table)}")
        return table[value]
    fits = {"criterion": isinstance(value, Criterion), "structure": hasattr(value, "layout")}
    if isinstance(value, type) or not fits.get(axis, callable(value)):
        raise TypeError(f"{axis} is {value!r}: give one of {list(table)} or an instance")
    return value
