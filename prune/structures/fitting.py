"""Which weights a structure fits: what it needs to know of a matrix, and what it leaves dense."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prune.structures.layout import Layout, Tensors
from workbench.messages import some
from workbench.models.matrices import Matrix, matrix_named


@dataclass(frozen=True)
class Fitting:
    """Weights, those that a structure fits apart from the others.

    Attributes:
        matrices: parameter name -> matrix, of those that it fits.
        left: parameter name -> why it does not fit, in words, of the others.
    """

    matrices: Mapping[str, Matrix]
    left: Mapping[str, str]

    def divided(self, indices: Mapping[str, Tensor | None], **rules: Any) -> Layout:
        """The layout whose units are divided by ``indices``, one for each matrix, each with a key of its own."""
        shapes = {name: matrix.parameter.shape for name, matrix in self.matrices.items()}
        return Layout(shapes, {name: [(name, index)] for name, index in indices.items()}, left=self.left, **rules)


def divide(structure: object, model: nn.Module, weights: Tensors, misfit: Callable[[Matrix], str | None]) -> Fitting:
    """Which of ``weights`` fit ``structure``: those of which ``misfit`` says nothing.

    Raises:
        ValueError: if none fits, naming some and why.
    """
    matrices = {name: matrix_named(model, name) for name in weights}
    left = {name: why for name, matrix in matrices.items() if (why := misfit(matrix)) is not None}
    if len(left) == len(matrices):
        raise ValueError(
            f"{structure} fits none of these weights: {some(left)} is {next(iter(left.values()))}. Choose another "
            "structure, such as unstructured"
        )
    return Fitting({name: matrix for name, matrix in matrices.items() if name not in left}, left)


def unordered(matrix: Matrix) -> str | None:
    """Why it is not known which dimension of a matrix is of its outputs; None if it is."""
    if matrix.transposed is None:
        return "of experts that do not tell whether inputs or outputs come first (a bool is_transposed)"
    return None


def no_inputs(matrix: Matrix) -> str | None:
    """Why the inputs of a matrix are no one dimension; None if they are."""
    return "of a bilinear layer, which has two inputs" if matrix.kind == "bilinear" else unordered(matrix)
