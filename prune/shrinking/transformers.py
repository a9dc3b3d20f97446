"""Groups of transformers: the units of their feed-forward nets, and the heads of their attention."""

from collections.abc import Iterator

from torch import nn

from prune.shrinking.units import Attribute, Group, Slot
from workbench.models.anatomy import Layer, layers_of
from workbench.models.resize import HEADS, WIDTHS, axes


def block_groups(model: nn.Module) -> Iterator[Group]:
    """The hidden units of every feed-forward net, and the heads of every attention, of transformers in ``model``."""
    for layer in layers_of(model):
        yield _feed_forward(layer)
        yield _heads(layer)


def _feed_forward(layer: Layer) -> Group:
    anatomy = layer.anatomy
    producers = [anatomy.up, *([] if anatomy.gate is None else [anatomy.gate])]
    indices = tuple((unit,) for unit in range(_outputs(layer, anatomy.up)))
    slots = [Slot(_path(layer, part), "outputs", indices) for part in producers]
    if anatomy.between is not None:
        slots.append(Slot(_path(layer, anatomy.between), "channels", indices))
    slots.append(Slot(_path(layer, anatomy.down), "inputs", indices))
    return Group(_path(layer, anatomy.up), tuple(slots))


def _heads(layer: Layer) -> Group:
    """Heads; query heads that share keys and values are one unit.

    A fused projection has the rows of all queries, then all keys, then all values.
    """
    inputs, width = layer.anatomy.inputs, layer.width
    fused = len(inputs) == 1
    queries = _outputs(layer, inputs[0]) // (3 if fused else 1)
    count = queries // width if fused else _outputs(layer, inputs[1]) // width
    per_unit = queries // count

    def spans(size: int, starts: tuple[int, ...] = (0,)) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(s + u * size + i for s in starts for i in range(size)) for u in range(count))

    if fused:
        slots = [Slot(_path(layer, inputs[0]), "outputs", spans(width, (0, queries, 2 * queries)))]
    else:
        sizes = (per_unit, width, width)
        slots = [Slot(_path(layer, part), "outputs", spans(size)) for part, size in zip(inputs, sizes)]
    slots.append(Slot(_path(layer, layer.anatomy.output), "inputs", spans(per_unit)))
    owner = inputs[0].rpartition(".")[0]
    module = layer.module.get_submodule(owner)
    amounts = {"num_key_value_heads": 1, "num_key_value_groups": 0, **dict.fromkeys(WIDTHS, per_unit)}
    counts = {
        Attribute(_path(layer, owner), name): amount
        for name in (*HEADS, *WIDTHS)
        if type(vars(module).get(name)) is int and (amount := amounts.get(name, per_unit // width))
    }
    return Group(_path(layer, inputs[0]), tuple(slots), counts)


def _path(layer: Layer, part: str) -> str:
    return ".".join(filter(None, (layer.path, part)))


def _outputs(layer: Layer, part: str) -> int:
    module = layer.module.get_submodule(part)
    dims = axes(module)
    if dims is None:
        raise ValueError(f"{_path(layer, part)} is {type(module).__name__}: only plain linear layers can be shrunk")
    weight = module.weight
    return weight.shape[dims[0]]  # type: ignore[union-attr, return-value]
