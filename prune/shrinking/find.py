"""Finding the units of a network.

Two sources, because neither does for all networks:

- transformers: heads and feed-forward units, read from their blocks (`workbench.models.anatomy`). The dependency graph
  would tie nearly all their channels to the residual stream, where nothing can be removed;
- other networks: Torch-Pruning's dependency graph (Fang et al., DepGraph: Towards any structural pruning, 2023,
  arXiv:2301.12900), imported only when it is needed.

The graph has a node for each layer and operation, and an edge from each side of a node to each side that must be pruned
with it: outputs of a layer to inputs of the next, inputs to outputs of channelwise layers, and both ways through sums
and concatenations. A group of the graph starts at the outputs of a root layer and lists, for every side it reaches,
pairs of a root channel and the channel there (``Link``). From these, units are made as follows::

    root channels 0 1 2 3 ...     two root channels are tied, so they are one unit, if
      │                             (a) they reach the same channel of a layer (flattened or concatenated channels), or
      ▼ ties (union-find)           (b) they are in one group of a GroupNorm, which normalises them together
    units {0} {1, 2} {3} ...      unit -> for every side, all channels that its root channels reach

A unit is removable only if every layer it reaches can lose channels without a change in what is left: the group is
dropped if it holds a bare parameter, a layer of an unknown kind or a grouped convolution, or channels that an operation
numbers anew (pixel shuffle); ``find_groups`` also drops groups that no layer consumes, or that touch a layer which is
called twice or shares its weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from prune.masks.memory import shared_memory
from prune.shrinking.equivalence import Call, tensors_of
from prune.shrinking.transformers import block_groups
from prune.shrinking.units import Group, Side, Slot
from workbench.models.resize import axes, is_channelwise, sizes


class Link(NamedTuple):
    """A channel of the root layer of a group, and the channel of another layer that must be pruned with it."""

    root: int
    channel: int


def find_groups(model: nn.Module, call: Call) -> list[Group]:
    """All groups of units that may be removed without changing the shape of what ``model`` takes and returns.

    Left out are units that no layer reads, that pass a layer of an unknown kind or one that mixes channels, that are in
    a layer which is called more than once, or whose weights are tied to others.

    Args:
        model: in eval mode; every parameter requires a gradient.
        call: what to call it with.

    Raises:
        ValueError: if the model cannot be traced.
    """
    barred = _tied(model) | _reused(model, call)
    groups = list(block_groups(model)) or list(_graph_groups(model, call))
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    fit = [each for each in groups if each.consumers and not any(slot.layer in barred for slot in each.slots)]
    return sorted(fit, key=lambda group: order[group.name])


def _graph_groups(model: nn.Module, call: Call) -> Iterator[Group]:
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
        graph_groups = _all_groups(graph)
    except Exception as error:  # the tracer's, or anything that the model raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} has something that its channels cannot be traced through ({type(error).__name__}: "
            f"{reason}): apply this to a part of it without, such as its convolutions"
        ) from error
    for graph_group in graph_groups:
        if (group := _group_of(graph, graph_group, names)) is not None:
            yield group


def _all_groups(graph: Any) -> list[Any]:
    """All groups of the graph.

    Where channels lead back to other channels of the same layer, Torch-Pruning's search never ends. Its loop walks over
    ``node.dependencies``, so lists that count how often they are walked over stop it.
    """
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


def _group_of(graph: Any, graph_group: Any, names: Mapping[nn.Module, str]) -> Group | None:
    """A group of the graph as ours; None if it holds something that cannot lose channels."""
    links: dict[tuple[str, Side], list[Link]] = {}
    ties: list[Sequence[int]] = []
    for item in graph_group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return None
        if module not in names:
            continue  # an operation without weights
        side = _side(module, graph.is_out_channel_pruning_fn(item.dep.handler))
        if side is None or not isinstance(getattr(module, "weight", 0), (nn.Parameter, type(None))):
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            return None
        if max(item.idxs, default=0) >= _channels(module, side):
            return None  # an operation between layers, such as a pixel shuffle, numbers channels anew
        new = [Link(root, channel) for root, channel in zip(item.root_idxs, item.idxs)]
        links.setdefault((names[module], side), []).extend(new)
        if isinstance(module, nn.GroupNorm):
            ties += _normalised_together(module, new)
    if not links:
        return None
    for each in links.values():
        ordered = sorted(each, key=lambda link: link.channel)
        ties += [(one.root, other.root) for one, other in pairwise(ordered) if one.channel == other.channel]
    units = _merged({link.root for each in links.values() for link in each}, ties)
    slots = [Slot(layer, side, _indices(units, each)) for (layer, side), each in links.items()]
    slots.sort(key=lambda slot: slot.side != "outputs")
    # Without a producer first, these are inputs of the network.
    return Group(slots[0].layer, tuple(slots)) if slots[0].side == "outputs" else None


def _side(module: nn.Module, outputs: bool) -> Side | None:
    """Which side of a layer loses channels; None if it cannot."""
    if is_channelwise(module):
        return "channels"
    if axes(module) is not None and getattr(module, "groups", 1) == 1:
        return "outputs" if outputs else "inputs"
    return None


def _channels(module: Any, side: Side) -> int:
    """How many channels a layer has on a side."""
    if (dims := axes(module)) is not None:
        return module.weight.shape[dims[1] if side == "inputs" else dims[0]]
    return next(size for name, size in sizes(module).items() if name != "num_groups")


def _normalised_together(norm: nn.GroupNorm, links: Sequence[Link]) -> list[Sequence[int]]:
    """The root channels of each of the norm's groups."""
    size = norm.num_channels // norm.num_groups
    root_of = {link.channel: link.root for link in links}
    starts = range(0, len(root_of), size)
    return [tuple(root_of[i] for i in range(start, start + size) if i in root_of) for start in starts]


def _merged(roots: set[int], ties: Sequence[Sequence[int]]) -> list[list[int]]:
    """``roots`` divided into the smallest sets that tear no tie apart, in order (union-find)."""
    parent = {root: root for root in roots}

    def representative(root: int) -> int:
        while parent[root] != root:
            parent[root] = root = parent[parent[root]]
        return root

    for tie in ties:
        for other in tie[1:]:
            low, high = sorted((representative(tie[0]), representative(other)))
            parent[high] = low
    units: dict[int, list[int]] = {}
    for root in sorted(roots):
        units.setdefault(representative(root), []).append(root)
    return list(units.values())


def _indices(units: Sequence[Sequence[int]], links: Sequence[Link]) -> tuple[tuple[int, ...], ...]:
    """Unit -> the channels that its root channels are linked to."""
    reached: dict[int, set[int]] = {}
    for root, channel in links:
        reached.setdefault(root, set()).add(channel)
    return tuple(tuple(sorted(set().union(*(reached.get(root, ()) for root in unit)))) for unit in units)


def _tied(model: nn.Module) -> set[str]:
    """Layers that share a parameter with another layer."""
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
