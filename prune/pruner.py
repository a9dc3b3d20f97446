"""The four axes composed: criterion x structure x allocation at a density, model -> Masks."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from prune.allocation import ALLOCATIONS, Allocation
from prune.criteria import CRITERIA, Criterion, seeded
from prune.masks import Masks, nearest
from prune.schedule import check_density
from prune.storage import memory_span, shared_memory
from prune.structure import Structure, Unstructured

STRUCTURES = {"unstructured": Unstructured}

Patterns = str | Sequence[str] | None

_ROLES = {"include": "can be pruned", "exclude": "the model has", "output": "are to be pruned"}


class Pruner:
    """Chooses which weights of a model to keep; changes nothing in the model.

    Each axis takes a name or an instance (``allocation="global"`` or ``allocation=Global(floor=0.05)``).

    Attributes:
        criterion: what a weight is worth: ``"magnitude"``, ``"random"``, or a ``Criterion``.
        structure: what stands or falls together: ``"unstructured"``, or a ``Structure``.
        allocation: how the density is divided over layers: ``"global"``, ``"uniform"``, ``"layerwise"``, or
            an ``Allocation``.
        include: name patterns (``fnmatch``); only prunable weights that match one are pruned. None for all.
        exclude: name patterns; weights that match one are not pruned.
        output: name pattern of the output layers, which ``"layerwise"`` prunes more slowly. None for the last
            prunable weight in definition order.
        seed: for criteria that draw random numbers; the draw depends on nothing but this and the parameter's
            name.

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
    ):
        """Parse names.

        Raises:
            TypeError: if an axis is neither a name nor an instance.
            ValueError: if a name is unknown, or the criterion needs data.
        """
        self.criterion: Criterion = _parse("criterion", criterion, CRITERIA)
        if self.criterion.needs_loader:
            raise ValueError(f"criterion '{self.criterion.name}' needs data, but a Pruner looks at weights only")
        self.structure: Structure = _parse("structure", structure, {n: make() for n, make in STRUCTURES.items()})
        self.allocation: Allocation = _parse("allocation", allocation, {n: make() for n, make in ALLOCATIONS.items()})
        self.include, self.exclude = _patterns(include), _patterns(exclude)
        self.output, self.seed = output, seed

    def __repr__(self) -> str:
        fields = {**vars(self), "criterion": self.criterion.name}
        return f"Pruner({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __call__(self, model: nn.Module, density: float, within: Masks | None = None) -> Masks:
        """Masks that keep the share ``density`` of the prunable weights.

        Args:
            model: weights are read, in fp32 or better, and left as they are.
            density: share to keep, in (0, 1], of the *original* number of weights, at every level; the count
                is ``schedule.kept(total, density)`` (by layer for ``"layerwise"``).
            within: the masks of the level before: the result is nested in them, scores at pruned positions
                are ignored, and density 1 returns them unchanged.

        Returns:
            Masks by parameter name in definition order, on the parameters' devices.

        Raises:
            ValueError: if the density is out of range or cannot be met, nothing is prunable, a pattern
                matches nothing, a weight is of a kind that cannot be ranked (meta, distributed, sparse,
                quantised) or has NaN or infinite values, or ``within`` is not for these parameters.
        """
        check_density(density)
        weights = prunable(model, self.include, self.exclude)
        for name, weight in weights.items():
            _check_weight(name, weight)
        if within is not None:
            _check_within(within, weights)
        if density == 1:
            return Masks.ones(weights) if within is None else within
        outputs = [] if self.output is None else _matching("output", (self.output,), {n: [n] for n in weights})
        scores = {name: self._score(name, weight) for name, weight in weights.items()}
        counts = self.allocation(scores, density, within=within, outputs=outputs)
        return Masks(self.structure(scores, counts, within))

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if self.criterion.needs_generator:
            return self.criterion.score(weight.detach(), seeded(self.seed, name))
        return self.criterion.score(weight.detach())


def prunable(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Parameter]:
    """The weights that pruning may touch, by first name, in definition order.

    They are the ``weight`` of Linear and Conv layers (transposed ones and transformers' ``Conv1D`` too);
    never norms, biases or embeddings. A weight shared by several such layers appears once; one shared with
    anything else (a decoder tied to its embedding) not at all.

    Args:
        model: anything.
        include: name patterns (``fnmatch``, case matters); keep only weights of which a name matches one.
            None for all.
        exclude: name patterns; leave out weights of which a name matches one.

    Raises:
        ValueError: if an ``include`` pattern matches no prunable weight, an ``exclude`` pattern no parameter,
            nothing is left, or two weights share only part of their memory.
    """
    groups = shared_memory(model)
    layers = {
        f"{path}.weight" if path else "weight": layer for path, layer in model.named_modules(remove_duplicate=False)
    }
    scope = [g for g in groups if all(name in layers and _is_prunable(layers[name]) for name, _ in g)]
    names = {group[0][0]: [name for name, _ in group] for group in scope}
    chosen = set(names)
    if not chosen:
        raise ValueError(f"this {type(model).__name__} has no Linear or Conv weight of its own: nothing can be pruned")
    if include is not None:
        chosen &= set(_matching("include", _patterns(include), names))
    if exclude is not None:
        everything = {group[0][0]: [name for name, _ in group] for group in groups}
        chosen -= set(_matching("exclude", _patterns(exclude), everything))
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} together leave no weight to prune: loosen them")
    for group in scope:
        views = {id(parameter): parameter for _, parameter in group}.values()
        partly = len(views) > 1 and len({(memory_span(view), view.numel()) for view in views}) > 1
        if group[0][0] in chosen and partly:
            raise ValueError(f"{[name for name, _ in group]} share only part of their memory: untie or exclude them")
    return {group[0][0]: group[0][1] for group in scope if group[0][0] in chosen}


def _is_prunable(layer: nn.Module) -> bool:
    # Conv1D is how transformers' GPT-2 spells Linear; known by name, so that transformers need not be there.
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or type(layer).__name__ == "Conv1D"


def _check_weight(name: str, weight: nn.Parameter) -> None:
    kind = None
    if type(weight) is not nn.Parameter:
        kind = f"a {type(weight).__name__}, not a plain parameter"
    elif weight.is_meta:
        kind = "on the meta device, without values"
    elif weight.layout != torch.strided:
        kind = f"stored as {weight.layout}"
    elif weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = f"of type {weight.dtype}"
    if kind is not None:
        raise ValueError(
            f"'{name}' is {kind}: pruning ranks dense floating-point weights, so materialise, gather or "
            "dequantise it, or exclude it"
        )
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise ValueError(
            f"'{name}' has {bad} NaN or infinite values of {weight.numel()}: the run that made it diverged"
        )


def _check_within(within: Masks, weights: Mapping[str, nn.Parameter]) -> None:
    if within.keys() != weights.keys():
        raise ValueError(
            f"`within` and this pruner differ in {sorted(within.keys() ^ weights.keys())}: "
            "give masks of this model, made with the same include and exclude"
        )
    for name, weight in weights.items():
        if within[name].shape != weight.shape:
            shapes = f"{tuple(within[name].shape)}, the weight {tuple(weight.shape)}"
            raise ValueError(f"`within` has '{name}' of shape {shapes}: give masks of this model")


def _patterns(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(role: str, patterns: Sequence[str] | None, names: Mapping[str, Sequence[str]]) -> list[str]:
    """First names of the weights of which some name matches a pattern; every pattern must match something."""
    found: list[str] = []
    for pattern in patterns or ():
        hits = [first for first, aliases in names.items() if any(fnmatchcase(alias, pattern) for alias in aliases)]
        if not hits:
            every = [alias for aliases in names.values() for alias in aliases]
            raise ValueError(
                f"{role} pattern {pattern!r} matches none of the {len(every)} names that {_ROLES[role]}; "
                f"nearest: {nearest(pattern, every)}"
            )
        found += hits
    return found


def _parse(axis: str, given: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(given, str):
        if given not in known:
            raise ValueError(
                f"unknown {axis} {given!r}: did you mean {nearest(given, known)[0]!r}? One of {list(known)}"
            )
        return known[given]
    if isinstance(given, type) or not (isinstance(given, Criterion) if axis == "criterion" else callable(given)):
        raise TypeError(f"{axis} is {given!r}: give one of {list(known)} or an instance")
    return given
