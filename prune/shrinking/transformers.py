"""Units of transformers: of their feed-forward nets, and heads of their attention."""

from collections.abc import Iterator

from torch import nn

from prune.shrinking.units import Slot, Units
from workbench.models.anatomy import Layer, layers_of
from workbench.models.resize import HEADS, WIDTHS, axes


def block_units(model: nn.Module) -> Iterator[Units]:
    """The hidden units of every feed-forward net, and the heads of every attention, of transformers in ``model``."""
    for layer in layers_of(model):
        anatomy = layer.anatomy
        makers = [anatomy.up, *([] if anatomy.gate is None else [anatomy.gate])]
        width = _outputs(layer, anatomy.up)
        each = tuple((unit,) for unit in range(width))
        sides = [*((maker, "outputs") for maker in makers), (anatomy.down, "inputs")]
        name = _path(layer, anatomy.up)
        yield Units(name, tuple(Slot(_path(layer, part), side, each) for part, side in sides))  # type: ignore[arg-type]
        yield _heads(layer)


def _heads(layer: Layer) -> Units:
    """Heads; where several share keys and values, these together."""
    inputs, width = layer.anatomy.inputs, layer.width
    fused = len(inputs) == 1
    made = _outputs(layer, inputs[0]) // (3 if fused else 1)
    count = made // width if fused else _outputs(layer, inputs[1]) // width
    per_unit = made // count

    def spans(size: int, starts: tuple[int, ...] = (0,)) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(s + u * size + i for s in starts for i in range(size)) for u in range(count))

    if fused:
        slots = [Slot(_path(layer, inputs[0]), "outputs", spans(width, (0, made, 2 * made)))]
    else:
        sizes = (per_unit, width, width)
        slots = [Slot(_path(layer, part), "outputs", spans(size)) for part, size in zip(inputs, sizes)]
    slots.append(Slot(_path(layer, layer.anatomy.output), "inputs", spans(per_unit)))
    holder = inputs[0].rpartition(".")[0]
    module = layer.module.get_submodule(holder)
    amounts = {"num_key_value_heads": 1, "num_key_value_groups": 0, **dict.fromkeys(WIDTHS, per_unit)}
    counts = {
        (_path(layer, holder), name): amount
        for name in (*HEADS, *WIDTHS)
        if type(vars(module).get(name)) is int and (amount := amounts.get(name, per_unit // width))
    }
    return Units(_path(layer, inputs[0]), tuple(slots), counts)


def _path(layer: Layer, part: str) -> str:
    return ".".join(filter(None, (layer.path, part)))


def _outputs(layer: Layer, part: str) -> int:
    module = layer.module.get_submodule(part)
    where = axes(module)
    if where is None:
        raise ValueError(f"{_path(layer, part)} is {type(module).__name__}: only plain linear layers can be shrunk")
    weight = module.weight
    return weight.shape[where[0]]  # type: ignore[union-attr, return-value]
