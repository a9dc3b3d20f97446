"""Structures whose units span several matrices of a transformer's layer: heads and feed-forward units."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prune.structures.layout import Layout, Member, Tensors
from workbench.models.anatomy import KINDS, Layer, layers_of
from workbench.models.matrices import matrix_named
from workbench.models.wrappers import named_modules, submodule


class Share(NamedTuple):
    """The part of the units in one matrix.

    Attributes:
        part: path of the matrix within the layer.
        outputs: whether units are its outputs, or its inputs.
        units: the unit of each output or input, int64, [outputs] or [inputs].
    """

    part: str
    outputs: bool
    units: Tensor


@dataclass(frozen=True)
class Head:
    """An attention head.

    Formula: unit = the head's rows of queries, keys and values, and its columns of the output projection. Query heads
    that share keys and values are one unit. Other weights are not covered.

    Source: Michel et al., Are sixteen heads really better than one?, 2019, arXiv:1905.10650, section 2.

    When to use: for transformers that ``shrink`` makes smaller.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each head, of the key ``<layer>.attention``.

        Raises:
            ValueError: if no attention is found among the weights.
        """
        return _layout("attention", model, weights, _heads)


@dataclass(frozen=True)
class FFN:
    """A hidden unit of a feed-forward net.

    Formula: unit = its row of the first matrix, and of the gate or its filter of the depthwise convolution if there is
    one, and its column of the second. Other weights are not covered.

    Source: McCarley et al., Structured pruning of a BERT-based question answering model, 2019, arXiv:1910.06360,
    section 3.

    When to use: for transformers that ``shrink`` makes smaller; most of their weights are here.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each hidden unit, of the key ``<layer>.ffn``.

        Raises:
            ValueError: if no feed-forward net is found among the weights.
        """
        return _layout("ffn", model, weights, _units)


def _layout(kind: str, model: nn.Module, weights: Tensors, shares: Callable[[Layer], Iterator[Share]]) -> Layout:
    members: dict[str, list[Member]] = {}
    for layer in layers_of(model):
        prefix = f"{layer.path}." if layer.path else ""
        for part, outputs, units in shares(layer):
            name = f"{prefix}{part}.weight"
            if name in weights:
                matrix = matrix_named(model, name)
                kernel = (None,) * (matrix.parameter.dim() - 2)
                index = matrix.back(units[(slice(None), None, *kernel)] if outputs else units[None])
                members[name] = [(f"{prefix}{kind}", index)]
    if not members:
        raise ValueError(
            f"none of the weights is known to be in the {kind} part of a transformer ({KINDS}): choose another "
            "structure, or loosen include and exclude"
        )
    ordered = {name: members[name] for name in weights if name in members}
    return Layout({name: weights[name].shape for name in ordered}, ordered)


def _heads(layer: Layer) -> Iterator[Share]:
    """Rows of queries by the head of keys and values that they go with, and the columns that read them."""
    anatomy, width = layer.anatomy, layer.width
    sizes = [_outputs(layer, part) for part in anatomy.inputs]
    queries, keys = (sizes[0] // 3, sizes[0] // 3) if len(sizes) == 1 else sizes[:2]
    if queries % width or keys % width or queries % keys:
        raise ValueError(f"'{layer.path}' has {queries} rows of queries and {keys} of keys, in heads of {width}")
    heads = [torch.arange(rows) // (width * rows // keys) for rows in (queries, keys, keys)]
    if len(sizes) == 1:
        yield Share(anatomy.inputs[0], True, torch.cat(heads))
    else:
        yield from (Share(part, True, units) for part, units in zip(anatomy.inputs, heads))
    yield Share(anatomy.output, False, heads[0])


def _units(layer: Layer) -> Iterator[Share]:
    anatomy = layer.anatomy
    units = torch.arange(_outputs(layer, anatomy.up))
    _check_between(layer, len(units))
    yield Share(anatomy.up, True, units)
    for part in filter(None, (anatomy.gate, anatomy.between)):
        yield Share(part, True, units)
    yield Share(anatomy.down, False, units)


def _check_between(layer: Layer, width: int) -> None:
    """Refuse a feed-forward net that has more layers over its hidden units: they would stay when units are removed."""
    parent = layer.anatomy.up.rpartition(".")[0]
    if not parent or parent != layer.anatomy.down.rpartition(".")[0]:
        return
    for path, module in named_modules(submodule(layer.module, parent)):
        inside = f"{parent}.{path}"
        known = any(f"{inside}.".startswith(f"{part}.") for part in layer.anatomy.parts)
        if path and not known and not isinstance(module, nn.PReLU):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() and len(parameter) == width:
                    where = ".".join(filter(None, (layer.path, inside, name)))
                    raise ValueError(
                        f"'{where}' works on the {width} hidden units between '{layer.anatomy.up}' and "
                        f"'{layer.anatomy.down}', so shrink could not remove any: choose another structure, such as "
                        "unstructured or channel"
                    )


def _outputs(layer: Layer, part: str) -> int:
    module = submodule(layer.module, part)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[-1 if type(module).__name__ == "Conv1D" else 0]
