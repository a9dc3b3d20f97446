"""The four axes composed: criterion x structure x allocation at a density, model -> Masks."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from prune.allocation import ALLOCATIONS, Allocation
from prune.criteria import CRITERIA, Criterion, seeded
from prune.masks import Masks
from prune.masks.enforce import nearest
from prune.pruner.scope import Patterns, check_fits, check_weight, matching, output_weight, patterns_of, prunable
from prune.schedule import check_density, exponential, kept
from prune.structures import STRUCTURES, Layout, Structure, structure_named
from workbench.checkpoints.bits import pack, unpack
from workbench.distributed.ranks import everyone, world

__all__ = ["Pruner", "prunable"]


class Pruner:
    """Chooses which weights of a model to keep; changes nothing in the model.

    Each axis takes a name or an instance (``allocation="global"`` or ``allocation=Global(floor=0.05)``).

    Attributes:
        criterion: what a weight is worth: a row of ``prune.criteria.CRITERIA`` by name, or a ``Criterion``.
        structure: what stands or falls together: ``"unstructured"``, any n:m such as ``"2:4"``, blocks such as
            ``"4x4"``, ``"channel"``, ``"head"``, ``"ffn"``, ``"balanced"``, or a ``Structure``.
        allocation: how the density is divided over layers: ``"global"``, ``"uniform"``, ``"layerwise"``, ``"erk"``,
            ``"erdos_renyi"``, or an ``Allocation``.
        include: name patterns (``fnmatch``) or types of layers; only prunable weights that match one are pruned. None
            for all.
        exclude: name patterns or types of layers; weights that match one are not pruned.
        output: name pattern of the output layers, which ``"layerwise"`` prunes more slowly. None for the last
            Linear or Conv layer in definition order; none is, where that is not pruned, as a head tied to an embedding.
        seed: for criteria that draw random numbers; the draw depends on nothing but this and the parameter's
            name.
        smallest: weights of fewer entries are not pruned.

    References: Frankle and Carbin, 2019, arXiv:1803.03635 (iterative magnitude pruning); Frankle et al.,
    2020, arXiv:1912.05671 (with rewinding to an early step).
    """

    def __init__(
        self,
        criterion: str | Criterion = "magnitude",
        structure: str | Structure = "unstructured",
        allocation: str | Allocation = "global",
        include: Patterns = None,
        exclude: Patterns = None,
        output: str | None = None,
        seed: int = 0,
        smallest: int = 1,
    ):
        """Parse names.

        Raises:
            TypeError: if an axis is neither a name nor an instance.
            ValueError: if a name is unknown.
        """
        self.criterion: Criterion = _parse("criterion", criterion, CRITERIA)
        named = structure_named(structure) if isinstance(structure, str) else structure
        self.structure: Structure = _parse("structure", named, STRUCTURES)
        self.allocation: Allocation = _parse("allocation", allocation, {n: make() for n, make in ALLOCATIONS.items()})
        self.include, self.exclude = patterns_of(include), patterns_of(exclude)
        self.output, self.seed, self.smallest = output, seed, smallest

    def __repr__(self) -> str:
        fields = {**vars(self), "criterion": self.criterion.name}
        return f"Pruner({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __call__(
        self,
        model: nn.Module,
        density: float,
        within: Masks | None = None,
        *,
        loader: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """Masks that keep the share ``density`` of the prunable units.

        A criterion that prunes in rounds goes from the density of ``within`` to this one by equal ratios, and scores
        the model anew at each, with what has been pruned set to zero. Where there is a process group, every rank must
        call a pruner that looks at data or is given scores: rank 0 decides, and all ranks get its masks.

        Args:
            model: weights are read, in fp32 or better, and left as they are, as is everything else.
            density: share to keep, in (0, 1], of the *original* number of units, at every level; the count is
                ``schedule.kept(total, density)`` (by key for ``"layerwise"``). Units are single weights unless the
                structure says otherwise.
            within: the masks of the level before: the result is nested in them, scores at pruned positions
                are ignored, and density 1 returns them unchanged.
            loader: batches, for a criterion that looks at data; read once a round.
            loss: ``loss(model, batch)``, a scalar, the mean over the batch, for a criterion that needs one.
            scores: instead of the criterion's own: parameter name -> scores of its shape, such as those summed up
                while training.

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
        everything = prunable(model, self.include, self.exclude, self.smallest)
        for name, weight in everything.items():
            check_weight(name, weight)
        layout = self._layout(model, everything)
        weights = {name: everything[name] for name in layout.shapes}
        if within is not None:
            check_fits("within", within, weights)
            if odd := within.keys() - weights.keys():
                raise ValueError(
                    f"`within` and this pruner differ in {sorted(odd)}: give masks of this model, made with the same "
                    "structure, include and exclude"
                )
        if density == 1:
            return Masks.ones(weights) if within is None else within
        outputs = self._outputs(model, layout, everything)
        if scores is not None:
            check_fits("scores", scores, weights)
            return self._agreed(self._chosen(layout, weights, scores, density, within, outputs))
        if not self.criterion.needs_loader:
            return self._chosen(layout, weights, self._scored(weights), density, within, outputs)
        given, rounds = self._data(loader, loss), self.criterion.rounds
        start = 1.0 if within is None else max(density, _share(layout, within))
        for step in range(1, rounds):
            target = float(min(exponential(step / rounds, density, start), layout.densest))
            found = self._looked(model, weights, within, given)
            with warnings.catch_warnings(), suppress(ValueError):  # what cannot be met on the way is passed over
                warnings.simplefilter("ignore")
                within = self._agreed(self._chosen(layout, weights, found, target, within, outputs))
        found = self._looked(model, weights, within, given)
        return self._agreed(self._chosen(layout, weights, found, density, within, outputs))

    def scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that masks of this pruner are for, by first name, in definition order.

        Raises:
            ValueError: as ``prunable``; or if the structure cannot divide a weight, or covers none that a pattern
                includes.
        """
        weights = prunable(model, self.include, self.exclude, self.smallest)
        return {name: weights[name] for name in self._layout(model, weights).shapes}

    def check(self, model: nn.Module, *densities: float) -> None:
        """Make sure that these can be asked for, before hours of training: in range, and allowed by the structure.

        Raises:
            ValueError: as a call; or naming the density that is above what the structure allows.
        """
        layout = self._layout(model, prunable(model, self.include, self.exclude, self.smallest))
        for density in densities:
            check_density(density)
            if density < 1:
                self._check_allowed(layout, density)

    def densest(self, model: nn.Module) -> float:
        """The highest density below 1 that the structure allows, n/m for N:M; 1 where every density is allowed."""
        return float(self._layout(model, prunable(model, self.include, self.exclude, self.smallest)).densest)

    def _check_allowed(self, layout: Layout, density: float) -> None:
        total = sum(layout.units.values())
        if kept(total, density) > total * layout.densest:
            raise ValueError(
                f"density {density} is above the {float(layout.densest):g} that {self.structure} allows: give that or "
                "less, or 1 to prune nothing"
            )

    def _layout(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Layout:
        layout = self.structure.layout(model, weights)
        for pattern in self.include or () if len(layout.shapes) < len(weights) else ():
            if not layout.shapes.keys() & prunable(model, (pattern,)).keys():
                raise ValueError(
                    f"include pattern {pattern!r} matches only weights that {self.structure} does not cover; it covers "
                    f"{list(layout.shapes)[:3]} and the like"
                )
        return layout

    def _outputs(self, model: nn.Module, layout: Layout, weights: Mapping[str, nn.Parameter]) -> list[str]:
        """The keys of the output layers."""
        if self.output is not None:
            found = matching("output", (self.output,), {name: [name] for name in weights})
        else:
            last = output_weight(model)
            found = [name for name, weight in weights.items() if weight is last]
        return [key for name in found for key, _ in layout.members.get(name, ())]

    def _data(self, loader: Any, loss: Any) -> tuple[Any, ...]:
        name, rounds = self.criterion.name, self.criterion.rounds
        needed = {"loader": loader, "loss": loss} if self.criterion.needs_loss else {"loader": loader}
        if missing := [argument for argument, value in needed.items() if value is None]:
            what = {"loader": "loader=, an iterable of batches", "loss": "loss=, a function of model and batch"}
            raise ValueError(
                f"criterion '{name}' looks at data: call the pruner with "
                f"{', and '.join(what[argument] for argument in missing)}; or with scores= of your own"
            )
        if rounds > 1 and isinstance(loader, Iterator):
            raise ValueError(
                f"criterion '{name}' reads the loader {rounds} times, and an iterator can be read once: give a list or "
                "a DataLoader"
            )
        return tuple(needed.values())

    def _looked(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], within: Masks | None, given: tuple[Any, ...]
    ) -> dict[str, Tensor]:
        """Scores of the model that is left in ``within``."""
        with _masked(model, within):
            scores = self.criterion.score(model, weights, *given)
        check_fits("scores", scores, weights)
        return scores

    def _scored(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if self.criterion.needs_generator:
            return {n: self.criterion.score(w.detach(), seeded(self.seed, n)) for n, w in weights.items()}
        return {name: self.criterion.score(weight.detach()) for name, weight in weights.items()}

    def _chosen(
        self,
        layout: Layout,
        weights: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        density: float,
        within: Masks | None,
        outputs: Sequence[str],
    ) -> Masks:
        self._check_allowed(layout, density)
        units = layout.pool(scores, within)
        candidates = layout.candidates(units, layout.alive(within))
        counts = self.allocation(units, density, within=candidates, outputs=outputs, shapes=layout.matrices)
        masks = layout.spread(layout.select(units, counts, candidates), within)
        return Masks({name: mask.to(weights[name].device) for name, mask in masks.items()})

    @staticmethod
    def _agreed(masks: Masks) -> Masks:
        """Those of rank 0, on every rank."""
        if world() == 1:
            return masks
        sent = [{name: pack(mask).cpu() for name, mask in masks.items()}]
        torch.distributed.broadcast_object_list(sent, src=0)
        agreed = Masks({n: unpack(sent[0][n], mask.shape).to(mask.device) for n, mask in masks.items()})
        if len(hashes := set(everyone(agreed.hash()))) > 1:
            raise RuntimeError(f"ranks hold different masks: {sorted(hashes)}; give all of them the same model")
        return agreed


@contextmanager
def _masked(model: nn.Module, masks: Masks | None) -> Iterator[None]:
    """Inside, ``model`` obeys the masks; afterwards its weights are what they were."""
    if masks is None or masks.obeyed_by(model):
        yield
        return
    weights = {name: model.get_parameter(name) for name in masks}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        masks.apply(model)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


def _share(layout: Layout, within: Masks) -> float:
    alive = layout.alive(within) or {}
    return sum(int(mask.sum()) for mask in alive.values()) / sum(layout.units.values())


def _parse(axis: str, given: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(given, str):
        if given not in known:
            raise ValueError(
                f"unknown {axis} {given!r}: did you mean {nearest(given, known)[0]!r}? One of {list(known)}"
            )
        return known[given]
    fits = {"criterion": isinstance(given, Criterion), "structure": hasattr(given, "layout")}
    if isinstance(given, type) or not fits.get(axis, callable(given)):
        raise TypeError(f"{axis} is {given!r}: give one of {list(known)} or an instance")
    return given
