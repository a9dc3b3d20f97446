"""Which weights of a model may be pruned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed, local, memory_span, owners, shared_memory, summed
from prune.pruner.dense import Left, left_dense
from prune.pruner.norms import check_norms
from prune.schedule import kept
from prune.structures import Layout, Structure
from workbench.messages import nearest
from workbench.models.matrices import Matrix, matrices, refusal
from workbench.models.wrappers import adapters, places, submodule

Pattern = str | type[nn.Module]
Patterns = Pattern | Sequence[Pattern] | None


_ROLES = {"include": "can be pruned", "exclude": "the model has", "output": "are to be pruned"}


@dataclass(frozen=True, eq=False)
class Scope:
    """The weights of a model that a pruner may prune, and the units that its structure divides them into.

    Attributes:
        model: the model.
        structure: the pruner's.
        include: the pruner's patterns; each must match a weight that the structure covers.
        exclude: the pruner's patterns.
        smallest: the pruner's; smaller weights are left out.
    """

    model: nn.Module
    structure: Structure
    include: tuple[Pattern, ...] | None = None
    exclude: tuple[Pattern, ...] | None = None
    smallest: int = 1

    @cached_property
    def prunable(self) -> dict[str, nn.Parameter]:
        """Weights that ``include``, ``exclude`` and ``smallest`` select, by first name, in definition order."""
        return prunable(self.model, self.include, self.exclude, self.smallest)

    @cached_property
    def layout(self) -> Layout:
        """The units.

        Raises:
            ValueError: if the structure cannot divide a weight, or covers none that a pattern of ``include`` matches.
        """
        layout = self.structure.layout(self.model, self.prunable)
        if len(layout.shapes) < len(self.prunable):
            for pattern in self.include or ():
                if not layout.shapes.keys() & prunable(self.model, (pattern,)).keys():
                    why = next((f" ('{name}' is {reason})" for name, reason in layout.left.items()), "")
                    raise ValueError(
                        f"include pattern {pattern!r} matches only weights that {self.structure} does not cover{why}; "
                        f"it covers {list(layout.shapes)[:3]} and the like"
                    )
        return layout

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that the structure covers; masks are for these."""
        return {name: self.prunable[name] for name in self.layout.shapes}

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The weights that the structure covers, and how each is laid out."""
        every = matrices(self.model)
        return {name: every[name] for name in self.layout.shapes}

    @cached_property
    def shapes(self) -> dict[str, list[Sequence[int]]]:
        """Key of the layout -> the shapes of the matrices that its units are in.

        Gates of a recurrent layer, queries, keys and values, and experts are matrices of their own.
        """
        shapes: dict[str, list[Sequence[int]]] = {}
        for name, members in self.layout.members.items():
            for key in dict.fromkeys(key for key, _ in members):
                shapes.setdefault(key, []).extend(self.matrices[name].shapes())
        return shapes

    @cached_property
    def dense(self) -> list[Left]:
        """The matrices that stay dense, though ``include``, ``exclude`` and ``smallest`` do not say so."""
        names = _Names(self.model)
        candidates = {
            group[0][0]: self._why(group, names)
            for group in names.groups
            if group[0][0] not in self.layout.shapes
            and group[0][1].numel() >= self.smallest
            and (self.include is None or names.fit(self.include, group))
            and not (self.exclude and names.fit(self.exclude, group))
        }
        return left_dense(self.model, candidates)

    def _why(self, group: Sequence[tuple[str, nn.Parameter]], names: "_Names") -> str | None:
        name = group[0][0]
        if name in names.adapters:
            return "adapters, which are added to a pruned layer: merge them by prune.merge_adapters, or name them"
        other = next((alias for alias, _ in group if alias not in names.matrices), None)
        if other is None:
            return self.layout.left.get(name, f"not covered by {self.structure}")
        return None if len(group) == 1 else f"shared with '{other}'"

    def check_masks(self, within: Mapping[str, Tensor]) -> None:
        """Refuse masks of other weights.

        Raises:
            ValueError: naming the weights that have no mask, or the masks that have no weight.
        """
        check_fits("within", within, self.weights)
        if extra := within.keys() - self.weights.keys():
            raise ValueError(
                f"`within` and this pruner differ in {sorted(extra)}: give masks of this model, made with the same "
                "structure, include and exclude"
            )

    def check_density(self, density: float) -> None:
        """Refuse a density above what the structure allows.

        Raises:
            ValueError: naming the highest density.
        """
        total = sum(self.layout.units.values())
        if kept(total, density) > total * self.layout.densest:
            raise ValueError(
                f"density {density} is above the {float(self.layout.densest):g} that {self.structure} allows: give "
                "that or less, or 1 to prune nothing"
            )
        check_norms(self.matrices, self.layout, density)


def prunable(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, smallest: int = 1
) -> dict[str, nn.Parameter]:
    """The weights that may be pruned, by first name, in definition order.

    They are the matrices of Linear, Conv, Bilinear, recurrent and attention layers (transposed convolutions and
    transformers' ``Conv1D`` too) and of fused experts; under ``weight_norm`` and ``spectral_norm`` what the weight is
    computed from (:mod:`workbench.models.matrices`). Never norms, biases or embeddings. A weight shared by several such
    layers appears once; one shared with anything else (a decoder tied to its embedding) not at all. Adapters (LoRA and
    others of PEFT), and copies that PEFT trains in place of a layer's weights and are out of use, are left out unless a
    pattern of ``include`` matches nothing else.

    Args:
        model: anything.
        include: name patterns (``fnmatch``, case matters) or types of layers; keep only weights of which a name or
            layer matches one. None for all.
        exclude: name patterns or types of layers; leave out weights of which a name or layer matches one.
        smallest: leave out weights of fewer entries.

    Raises:
        ValueError: if an ``include`` pattern matches no prunable weight, an ``exclude`` pattern no parameter,
            nothing is left, or two weights share only part of their memory.
    """
    names = _Names(model)
    scope = [group for group in names.groups if all(name in names.matrices for name, _ in group)]
    chosen = {group[0][0] for group in scope}
    adapting = chosen & names.adapters
    chosen = (chosen - adapting) if include is None else chosen
    if not chosen:
        raise ValueError(f"this {type(model).__name__} has no matrix of a layer that is known: nothing can be pruned")
    if include is not None:
        patterns = patterns_of(include) or ()
        names.check_include(patterns, scope)
        # One that names adapters alone selects them; a wider one means the network's own weights.
        hits = [set(matching("include", (pattern,), names.of(scope), names.layers)) for pattern in patterns]
        chosen &= set().union(*(found - adapting or found for found in hits))
    if exclude is not None:
        chosen -= set(matching("exclude", patterns_of(exclude) or (), names.of(names.groups), names.layers))
    if smallest > 1:
        chosen -= (small := {g[0][0] for g in scope if g[0][0] in chosen and g[0][1].numel() < smallest})
        if small and not chosen:
            raise ValueError(f"smallest is {smallest}, but all {len(small)} weights have fewer entries: lower it")
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} together leave no weight to prune: loosen them")
    for group in scope:
        views = {id(parameter): parameter for _, parameter in group}.values()
        partly = len(views) > 1 and len({(memory_span(view), view.numel()) for view in views}) > 1
        if group[0][0] in chosen and partly:
            raise ValueError(f"{[name for name, _ in group]} share only part of their memory: untie or exclude them")
    return {group[0][0]: group[0][1] for group in scope if group[0][0] in chosen}


_Group = Sequence[tuple[str, nn.Parameter]]


class _Names:
    """The parameters of a model by all names that patterns may match.

    A parameter that a layer's weight is computed from, such as ``weight_v``, has the name of the weight, too.

    Attributes:
        groups: parameters with all their names, those that share memory together.
        matrices: name -> matrix, of those that can be pruned.
        adapters: names of adapters, which are pruned only where a pattern names nothing else.
        layers: name -> the layer that has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.groups, self.matrices = model, shared_memory(model), matrices(model)
        self.layers = {name: place.owner for name, place in places(model).items()}
        self.adapters = adapters(model).keys()
        self._products: dict[str, str] = {}
        for name in list(self.layers):
            path, _, product = name.rpartition(".")[0].rpartition(".")
            owner, _, marker = path.rpartition(".")
            if marker == "parametrizations":
                self._products[name] = f"{owner}.{product}".lstrip(".")
                self.layers[name] = self.layers[self._products[name]] = submodule(model, owner)
        for name, matrix in self.matrices.items():  # hooks of old
            if matrix.made_by is not None and name not in self._products:
                path = name.rpartition(".")[0]
                self._products[name] = f"{path}.{matrix.attribute}".lstrip(".")
                self.layers[self._products[name]] = matrix.layer

    def of(self, groups: Iterable[_Group]) -> dict[str, list[str]]:
        """First name -> all names."""
        return {group[0][0]: self._aliases(group) for group in groups}

    def fit(self, patterns: Iterable[Pattern], group: _Group) -> bool:
        """Whether a pattern matches one of its names or layers."""
        return any(_fits(pattern, name, self.layers) for pattern in patterns for name in self._aliases(group))

    def check_include(self, patterns: Iterable[Pattern], scope: Sequence[_Group]) -> None:
        """Refuse a pattern that matches nothing but what cannot be pruned, and say why it cannot.

        Raises:
            ValueError: naming the pattern and a parameter.
        """
        others = [group for group in self.groups if group not in scope]
        for pattern in patterns:
            if any(self.fit((pattern,), group) for group in scope):
                continue
            for group in (group for group in others if self.fit((pattern,), group)):
                alias = next(name for name, _ in group if name not in self.matrices)
                raise ValueError(
                    f"include pattern {pattern!r} matches only what cannot be pruned: '{group[0][0]}' is "
                    f"{refusal(self.model, alias)}"
                )

    def _aliases(self, group: _Group) -> list[str]:
        return [alias for name, _ in group for alias in (name, self._products.get(name, name))]


def output_weight(model: nn.Module) -> nn.Parameter | None:
    """The weight of the last Linear, Conv or Bilinear layer in definition order, also if it is a tied one."""
    kinds = ("linear", "convolution", "bilinear")
    every = list(matrices(model).values())
    return next((matrix.parameter for matrix in reversed(every) if matrix.kind in kinds), None)


def check_weight(name: str, weight: nn.Parameter) -> None:
    """Refuse a weight without values that can be ranked; called on every rank that has a shard of it.

    Raises:
        ValueError: naming it.
    """
    kind = None
    if type(weight) is not nn.Parameter and not distributed(weight):
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
    bad = int(summed((~local(weight).isfinite()).sum(), owners(weight)))
    if bad:
        raise ValueError(f"'{name}' has {bad} NaN or infinite values of {weight.numel()}: training diverged")


def check_fits(what: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that lack a weight or have another shape.

    Raises:
        ValueError: If a weight has none; names it.
    """
    if missing := sorted(weights.keys() - tensors.keys()):
        raise ValueError(
            f"`{what}` and this pruner differ in {missing}: give {'masks' if what == 'within' else what} of this "
            "model, made with the same structure, include and exclude"
        )
    for name, weight in weights.items():
        if tensors[name].shape != weight.shape:
            shapes = f"{tuple(tensors[name].shape)}, the weight {tuple(weight.shape)}"
            raise ValueError(f"`{what}` has '{name}' of shape {shapes}: give those of this model")


def patterns_of(patterns: Patterns) -> tuple[Pattern, ...] | None:
    """One pattern or several, as a tuple."""
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, (str, type)) else tuple(patterns)


def matching(
    role: str,
    patterns: Iterable[Pattern],
    names: Mapping[str, Sequence[str]],
    layers: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """First names of the parameters of which some name or layer matches a pattern.

    Args:
        role: what the patterns are for, for the message.
        patterns: of names, or types of layers.
        names: first name -> all names.
        layers: name -> the layer that has it, where there may be types among the patterns.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    matches: list[str] = []
    for pattern in patterns:
        hits = [n for n, aliases in names.items() if any(_fits(pattern, alias, layers or {}) for alias in aliases)]
        if not hits:
            every = list(dict.fromkeys(alias for aliases in names.values() for alias in aliases))
            hint = nearest(pattern, every) if isinstance(pattern, str) else ""
            raise ValueError(
                f"{role} pattern {pattern!r} matches none of the {len(every)} names that {_ROLES[role]}{hint}"
            )
        matches += hits
    return matches


def _fits(pattern: Pattern, name: str, layers: Mapping[str, nn.Module]) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(layers.get(name), pattern)
