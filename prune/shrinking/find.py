"""Finding the units of a network.

Those of transformers, heads and feed-forward units, are read off their blocks (`workbench.models.anatomy`); those of
other networks off Torch-Pruning's dependency graph (Fang et al., DepGraph: Towards any structural pruning, 2023,
arXiv:2301.12900), which is loaded when it is needed. In a transformer that graph would tie nearly everything to the
residual stream, where nothing can go.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from prune.masks.memory import shared_memory
from prune.shrinking.equivalence import Call, tensors_of
from prune.shrinking.transformers import block_units
from prune.shrinking.units import Side, Slot, Units
from workbench.models.resize import axes, is_channelwise, sizes


def find_units(model: nn.Module, call: Call) -> list[Units]:
    """All units of ``model`` that may be taken out without changing the shape of what it takes and returns.

    Left out are those that no layer reads, that pass a layer of an unknown kind or one that mixes channels, that lie in
    a layer which is called more than once, or whose weights are tied to others.

    Args:
        model: in eval mode; every parameter requires a gradient.
        call: what to call it with.

    Raises:
        ValueError: if the model cannot be traced.
    """
    barred = _tied(model) | _reused(model, call)
    found = list(block_units(model)) or list(_graph_units(model, call))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    fit = [units for units in found if units.read and not any(slot.layer in barred for slot in units.slots)]
    return sorted(fit, key=lambda units: place[units.name])


def _graph_units(model: nn.Module, call: Call) -> Iterator[Units]:
    from torch_pruning import DependencyGraph

    graph = DependencyGraph()
    names = {module: name for name, module in model.named_modules()}
    try:
        with torch.enable_grad():
            graph.build_dependency(
                model,
                (),
                forward_fn=lambda network, _: call.run(network),
                output_transform=lambda out: [value for value in tensors_of(out) if value.grad_fn is not None],
                verbose=False,
            )
        groups = _groups(graph)
    except Exception as error:  # the tracer's own, and whatever the model raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} has something that its channels cannot be traced through ({type(error).__name__}: "
            f"{reason}): apply this to a part of it without, such as its convolutions"
        ) from error
    for group in groups:
        if (units := _units_of(graph, group, names)) is not None:
            yield units


def _groups(graph: Any) -> list[Any]:
    """All groups of the graph; where channels lead back to other channels of themselves, it would look for ever."""
    nodes = graph.module2node.values()
    limit, steps = 8 * len(nodes) + 500, 0

    class Counted(list):
        def __iter__(self) -> Iterator[Any]:
            nonlocal steps
            steps += 1
            if steps > limit:
                raise RuntimeError("channels lead back to other channels of themselves")
            return super().__iter__()

    for node in nodes:
        node.dependencies = Counted(node.dependencies)
    groups = []
    for group in graph.get_all_groups():
        groups.append(group)
        steps = 0
    return groups


def _units_of(graph: Any, group: Any, names: Mapping[nn.Module, str]) -> Units | None:
    """A group of the graph; None if it holds something that cannot be cut."""
    sides: dict[tuple[str, Side], list[tuple[int, int]]] = {}
    bundles: list[list[tuple[int, ...]]] = []
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return None
        if module not in names:
            continue  # an operation without weights
        outputs = graph.is_out_channel_pruning_fn(item.dep.handler)
        side: Side | None = "channels" if is_channelwise(module) else None
        if side is None and axes(module) is not None and getattr(module, "groups", 1) == 1:
            side = "outputs" if outputs else "inputs"
        if side is None or not isinstance(getattr(module, "weight", 0), (nn.Parameter, type(None))):
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            return None
        if max(item.idxs, default=0) >= _size(module, side):
            return None  # something between layers, such as a pixel shuffle, numbers channels anew
        sides.setdefault((names[module], side), []).extend(zip(item.root_idxs, item.idxs))
        if isinstance(module, nn.GroupNorm):
            size = module.num_channels // module.num_groups
            of = {index: root for root, index in zip(item.root_idxs, item.idxs)}
            bundles.append(
                [tuple(of[i] for i in range(start, start + size) if i in of) for start in range(0, len(of), size)]
            )
    if not sides:
        return None
    bundles += [
        [(one, other) for (one, i), (other, j) in pairwise(pairs) if i == j]
        for pairs in (sorted(found, key=lambda pair: pair[1]) for found in sides.values())
    ]
    roots = _united({root for found in sides.values() for root, _ in found}, bundles)
    slots = []
    for (layer, side), found in sides.items():
        places: dict[int, set[int]] = {}
        for root, index in found:
            places.setdefault(root, set()).add(index)
        slots.append(
            Slot(layer, side, tuple(tuple(sorted(set().union(*(places.get(r, ()) for r in unit)))) for unit in roots))
        )
    slots.sort(key=lambda slot: slot.side != "outputs")
    return Units(slots[0].layer, tuple(slots)) if slots[0].side == "outputs" else None


def _size(module: Any, side: Side) -> int:
    """How many channels a layer has on a side."""
    if (where := axes(module)) is not None:
        return module.weight.shape[where[0] if side != "inputs" else where[1]]
    return next(size for name, size in sizes(module).items() if name != "num_groups")


def _united(roots: set[int], bundles: list[list[tuple[int, ...]]]) -> list[list[int]]:
    """``roots`` divided into the smallest sets that hold whole bundles, in order."""
    parent = {root: root for root in roots}

    def top(root: int) -> int:
        while parent[root] != root:
            parent[root] = root = parent[parent[root]]
        return root

    for bundle in (bundle for several in bundles for bundle in several):
        for other in bundle[1:]:
            one, two = sorted((top(bundle[0]), top(other)))
            parent[two] = one
    united: dict[int, list[int]] = {}
    for root in sorted(roots):
        united.setdefault(top(root), []).append(root)
    return list(united.values())


def _tied(model: nn.Module) -> set[str]:
    """Layers whose parameters other layers have, too."""
    return {name.rpartition(".")[0] for group in shared_memory(model) if len(group) > 1 for name, _ in group}


def _reused(model: nn.Module, call: Call) -> set[str]:
    """Layers that are called more than once in a forward pass."""
    calls: dict[str, int] = {}

    def counting(name: str) -> Any:
        def count(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    hooks = [
        module.register_forward_pre_hook(counting(name))
        for name, module in model.named_modules()
        if axes(module) is not None or is_channelwise(module)
    ]
    try:
        call.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, count in calls.items() if count > 1}
