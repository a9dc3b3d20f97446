"""Structures whose units are groups of weights within one layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.structures.axes import groups_of, layer_of, shape_of, turned
from prune.structures.layout import Layout, Tensors


@dataclass(frozen=True)
class Channel:
    """An output of a layer with all its weights.

    Formula: unit = a row of a matrix, or a filter of a convolution. Exclude the output layer, whose outputs are the
    predictions.

    Source: Li et al., Pruning filters for efficient ConvNets, 2017, arXiv:1608.08710, section 3.1 (the sum of a
    filter's magnitudes: within a layer the same order as their mean).

    When to use: for plain networks that ``shrink`` makes smaller. With residual connections use ``Coupled``.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each output."""
        return _layout(weights, {n: _outputs(layer_of(model, n), w) for n, w in weights.items()})


@dataclass(frozen=True)
class Block:
    """Rectangles of a weight.

    Formula: unit = ``rows`` consecutive outputs x ``columns`` consecutive inputs; in a convolution the whole kernel.

    Source: Narang et al., Block-sparse recurrent neural networks, 2017, arXiv:1711.02782, section 3.

    When to use: for block-sparse kernels, such as 16x16 on GPUs or 1x4 on CPUs.

    Attributes:
        rows: consecutive outputs.
        columns: consecutive inputs, of one group.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a block of {self.rows} x {self.columns} is empty: give 1 or more rows and columns")

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each block.

        Raises:
            ValueError: if blocks do not divide a layer.
        """
        layers = {name: layer_of(model, name) for name in weights}
        shapes = {name: shape_of(layers[name], weight) for name, weight in weights.items()}
        if indivisible := {n: tuple(s[:2]) for n, s in shapes.items() if s[0] % self.rows or s[1] % self.columns}:
            raise ValueError(
                f"blocks of {self.rows} outputs x {self.columns} inputs do not divide these layers: {indivisible}; "
                "exclude them, or choose other blocks"
            )
        return _layout(weights, {n: turned(layers[n], self._index(shape)) for n, shape in shapes.items()})

    def _index(self, shape: torch.Size) -> Tensor:
        rows = torch.arange(shape[0]) // self.rows * (shape[1] // self.columns)
        index = rows[:, None] + torch.arange(shape[1]) // self.columns
        return index[(...,) + (None,) * (len(shape) - 2)]


def _outputs(layer: nn.Module, weight: Tensor) -> Tensor:
    shape = shape_of(layer, weight)
    index = torch.arange(shape[0])[(...,) + (None,) * (len(shape) - 1)]
    # In a grouped transposed convolution the groups share columns, and the row tells which output it is.
    return turned(layer, index.expand(-1, shape[1], *index.shape[2:]) if groups_of(layer) > 1 else index)


def _layout(weights: Tensors, indices: dict[str, Tensor]) -> Layout:
    return Layout({n: w.shape for n, w in weights.items()}, {n: [(n, index)] for n, index in indices.items()})
