"""Structures whose units are groups of weights within one layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune.structures.fitting import divide, no_inputs
from prune.structures.layout import Layout, Tensors
from workbench.models.matrices import Matrix


@dataclass(frozen=True)
class Channel:
    """An output of a layer with all its weights.

    Formula: unit = a row of a matrix, or a filter of a convolution. Exclude the output layer, whose outputs are the
    predictions. Recurrent, attention and bilinear layers, fused experts and layers under ``weight_norm`` are not
    covered.

    Source: Li et al., Pruning filters for efficient ConvNets, 2017, arXiv:1608.08710, section 3.1 (the sum of a
    filter's magnitudes: within a layer the same order as their mean).

    When to use: for plain networks that ``shrink`` makes smaller. With residual connections use ``Coupled``.
    """

    def layout(self, model: nn.Module, weights: Tensors) -> Layout:
        """One unit for each output.

        Raises:
            ValueError: if it covers none of the weights.
        """
        fitting = divide(self, model, weights, _no_channels)
        return fitting.divided({name: _outputs(matrix) for name, matrix in fitting.matrices.items()})


@dataclass(frozen=True)
class Block:
    """Rectangles of a weight.

    Formula: unit = ``rows`` consecutive outputs x ``columns`` consecutive inputs; in a convolution the whole kernel.
    Bilinear layers are not covered.

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
        fitting = divide(self, model, weights, no_inputs)
        shapes = {name: matrix.turned_shape() for name, matrix in fitting.matrices.items()}
        sides = {n: (s[0] // fitting.matrices[n].experts, s[1]) for n, s in shapes.items()}
        if indivisible := {n: side for n, side in sides.items() if side[0] % self.rows or side[1] % self.columns}:
            raise ValueError(
                f"blocks of {self.rows} outputs x {self.columns} inputs do not divide these layers: {indivisible}; "
                "exclude them, or choose other blocks"
            )
        return fitting.divided({n: fitting.matrices[n].back(self._index(shape)) for n, shape in shapes.items()})

    def _index(self, shape: torch.Size) -> Tensor:
        rows = torch.arange(shape[0]) // self.rows * (shape[1] // self.columns)
        index = rows[:, None] + torch.arange(shape[1]) // self.columns
        return index[(...,) + (None,) * (len(shape) - 2)]


def _outputs(matrix: Matrix) -> Tensor:
    shape = matrix.turned_shape()
    index = torch.arange(shape[0])[(...,) + (None,) * (len(shape) - 1)]
    # In a grouped transposed convolution the groups share columns, and the row tells which output it is.
    return matrix.back(index.expand(-1, shape[1], *index.shape[2:]) if matrix.grouped else index)


def _no_channels(matrix: Matrix) -> str | None:
    """Why the outputs of a matrix are no channels that could be removed; None if they are."""
    if matrix.norm is not None:
        return "under weight_norm, which divides by the norm of an output's weights"
    reasons = {
        "recurrent": "its rows are gates of a recurrent layer",
        "attention": "its rows are parts of attention heads",
        "experts": "its rows are of one expert each",
        "bilinear": "of a bilinear layer",
    }
    return reasons.get(matrix.kind)
