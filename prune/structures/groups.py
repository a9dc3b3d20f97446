"""Structures whose units are groups of weights within one layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.structures.axes import groups_of, layer_of, shape_of, turned
from prune.structures.layout import Layout, Tensors


@dataclass(frozen=True)
class Channel:
    """An output of a layer with all its weights: a row of a matrix, a filter of a convolution.

    Those of an output layer are the answers: exclude it.

    Reference: Li et al., Pruning filters for efficient ConvNets, 2017, arXiv:1608.08710, section 3.1 (the sum of a
    filter's magnitudes: within a layer the same order as their mean).
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each output."""
        return _layout(weights, {n: _outputs(layer_of(model, n), w) for n, w in weights.items()})


@dataclass(frozen=True)
class Block:
    """Rectangles of ``rows`` outputs by ``columns`` inputs; of a convolution with the whole kernel.

    Attributes:
        rows: neighbouring outputs.
        columns: neighbouring inputs, of one group.

    Reference: Narang et al., Block-sparse recurrent neural networks, 2017, arXiv:1711.02782, section 3.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a block of {self.rows} x {self.columns} is none: give 1 or more rows and columns")

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each block.

        Raises:
            ValueError: if blocks do not divide a layer.
        """
        layers = {name: layer_of(model, name) for name in weights}
        shapes = {name: shape_of(layers[name], weight) for name, weight in weights.items()}
        if odd := {n: tuple(s[:2]) for n, s in shapes.items() if s[0] % self.rows or s[1] % self.columns}:
            raise ValueError(
                f"blocks of {self.rows} outputs x {self.columns} inputs do not divide these layers: {odd}; exclude "
                "them, or choose other blocks"
            )
        return _layout(weights, {n: turned(layers[n], self._index(shape)) for n, shape in shapes.items()})

    def _index(self, shape: torch.Size) -> Tensor:
        rows = torch.arange(shape[0]) // self.rows * (shape[1] // self.columns)
        index = rows[:, None] + torch.arange(shape[1]) // self.columns
        return index[(...,) + (None,) * (len(shape) - 2)]


def _outputs(layer: nn.Module, weight: Tensor) -> Tensor:
    shape = shape_of(layer, weight)
    index = torch.arange(shape[0])[(...,) + (None,) * (len(shape) - 1)]
    # In a grouped transposed convolution an output's column is shared by the groups, and its rows tell which it is.
    return turned(layer, index.expand(-1, shape[1], *index.shape[2:]) if groups_of(layer) > 1 else index)


def _layout(weights: Tensors, indices: dict[str, Tensor]) -> Layout:
    return Layout({n: w.shape for n, w in weights.items()}, {n: [(n, index)] for n, index in indices.items()})
