"""Which weights of a model may be pruned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed, local, memory_span, owners, shared_memory, summed
from prune.schedule import kept
from prune.structures import Layout, Structure
from workbench.messages import nearest
from workbench.models.wrappers import places

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
        prunable: weights that ``include``, ``exclude`` and ``smallest`` select, by first name, in definition order.
    """

    model: nn.Module
    structure: Structure
    include: tuple[Pattern, ...] | None
    prunable: Mapping[str, nn.Parameter]

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
                    raise ValueError(
                        f"include pattern {pattern!r} matches only weights that {self.structure} does not cover; it "
                        f"covers {list(layout.shapes)[:3]} and the like"
                    )
        return layout

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that the structure covers; masks are for these."""
        return {name: self.prunable[name] for name in self.layout.shapes}

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


def prunable(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, smallest: int = 1
) -> dict[str, nn.Parameter]:
    """The weights that may be pruned, by first name, in definition order.

    They are the ``weight`` of Linear and Conv layers (transposed ones and transformers' ``Conv1D`` too);
    never norms, biases or embeddings. A weight shared by several such layers appears once; one shared with
    anything else (a decoder tied to its embedding) not at all.

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
    groups = shared_memory(model)
    layers = {name: place.owner for name, place in places(model).items()}
    scope = [g for g in groups if all(_is_prunable(name, layers[name]) for name, _ in g)]
    names = {group[0][0]: [name for name, _ in group] for group in scope}
    chosen = set(names)
    if not chosen:
        raise ValueError(f"this {type(model).__name__} has no Linear or Conv weight: nothing can be pruned")
    if include is not None:
        chosen &= set(matching("include", patterns_of(include) or (), names, layers))
    if exclude is not None:
        everything = {group[0][0]: [name for name, _ in group] for group in groups}
        chosen -= set(matching("exclude", patterns_of(exclude) or (), everything, layers))
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


def _is_prunable(name: str, layer: nn.Module) -> bool:
    # Conv1D is how transformers' GPT-2 spells Linear; known by name, so that transformers need not be there.
    prunable_type = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or type(layer).__name__ == "Conv1D"
    return prunable_type and name.rpartition(".")[2] == "weight"


def output_weight(model: nn.Module) -> nn.Parameter | None:
    """The weight of the last Linear or Conv layer in definition order, also if it cannot be pruned, as a tied one."""
    return next(
        (
            parameter
            for layer in reversed(list(model.modules()))
            for name, parameter in reversed(layer._parameters.items())
            if parameter is not None and _is_prunable(name, layer)
        ),
        None,
    )


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
        by_name = isinstance(pattern, str)
        fits = partial(fnmatchcase, pat=pattern) if by_name else partial(_is_in, layers or {}, pattern)
        hits = [first for first, aliases in names.items() if any(fits(alias) for alias in aliases)]
        if not hits:
            every = [alias for aliases in names.values() for alias in aliases]
            hint = nearest(pattern, every) if by_name else ""
            raise ValueError(
                f"{role} pattern {pattern!r} matches none of the {len(every)} names that {_ROLES[role]}{hint}"
            )
        matches += hits
    return matches


def _is_in(layers: Mapping[str, nn.Module], kind: type, name: str) -> bool:
    return isinstance(layers.get(name), kind)
