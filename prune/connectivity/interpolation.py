"""Linear interpolation between two networks, and the error barrier on the way (linear mode connectivity).

Instability analysis (Frankle et al., 2020, arXiv:1912.05671): train two copies of a network with different data orders
from the same point, and interpolate between the results. If there is no barrier, training from that point is *stable*
to SGD noise. Pruned networks that are stable at the rewind point are the ones that reach the dense network's accuracy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.messages import some

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
STABLE = 0.02  # of error, in [0, 1]: below it the paper calls a network stable


@dataclass(frozen=True)
class Barrier:
    """Error or loss along the line alpha * a + (1 - alpha) * b.

    Attributes:
        alphas: From 0 (b) to 1 (a), at equal distances.
        heights: The error or loss at each of them.
    """

    alphas: tuple[float, ...]
    heights: tuple[float, ...]

    @property
    def ends(self) -> tuple[float, float]:
        """The heights of a and of b."""
        return self.heights[-1], self.heights[0]

    @property
    def barrier(self) -> float:
        """The linear interpolation instability: max over alpha of the height, minus the mean of the two ends.

        At least half the difference of the ends. NaN if any height is.

        Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
        arXiv:1912.05671, section 2.
        """
        return _highest(self.heights) - sum(self.ends) / 2

    @property
    def excess(self) -> float:
        """Max over alpha of the height minus the straight line between the ends; at least 0.

        For ends of different heights, such as two levels of a hunt. NaN if any height is.

        Source: Entezari, Sedghi, Saukh, Neyshabur, "The Role of Permutation Invariance in Linear Mode Connectivity",
        2022, arXiv:2110.06296, equation 1.
        """
        a, b = self.ends
        straight = [alpha * a + (1 - alpha) * b for alpha in self.alphas[1:-1]]
        return _highest([0.0, *(height - line for height, line in zip(self.heights[1:-1], straight))])

    @property
    def stable(self) -> bool:
        """Whether a and b are linearly connected: a barrier below 0.02, where heights are errors in [0, 1]."""
        return self.barrier < STABLE


def barrier(
    evaluate: Callable[[dict[str, Tensor]], float],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    points: int = 11,
) -> Barrier:
    """The error barrier between two networks of one architecture, by ``points`` evaluations.

    Running statistics of batch norms that are interpolated like weights are those of neither network, and add a
    barrier: let ``evaluate`` estimate them anew at every point, as :func:`prune.connectivity.temporary_states` does.

    Args:
        evaluate: The error or loss of a state dict; called from b to a.
        a: A state dict; may be the live one of the evaluated network.
        b: Another, of the same names, shapes and types.
        points: How many alphas, both ends included; 3 or more.

    Raises:
        ValueError: If there are fewer points, or the state dicts do not fit together.

    Source: Frankle, Dziugaite, Roy, Carbin, 2020, arXiv:1912.05671, section 2.
    """
    if points < 3:
        raise ValueError(f"points is {points}: give 3 or more, the two ends included")
    a, b = interpolate(a, a, 1.0), interpolate(b, b, 0.0)  # copies: `evaluate` may overwrite a live state dict
    alphas = tuple(step / (points - 1) for step in range(points))
    return Barrier(alphas, tuple(float(evaluate(interpolate(a, b, alpha))) for alpha in alphas))


@torch.no_grad()
def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The point alpha * a + (1 - alpha) * b of two state dicts, on the devices of a.

    Exactly a at 1, exactly b at 0, and entries that are equal in both stay as they are: a weight that is masked in both
    stays zero. Integers, such as counters, are those of the nearer end, of a in the middle.

    Args:
        a: A state dict.
        b: Another, of the same names, shapes and types.
        alpha: In [0, 1].

    Returns:
        New tensors, in the order of a.

    Raises:
        ValueError: If alpha is out of range, or names, shapes or types differ.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: give 0, for b, to 1, for a")
    if different := a.keys() ^ b.keys():
        raise ValueError(f"{some(sorted(different))}: in one of the two only; give state dicts of one architecture")
    return {name: _lerp(name, value, b[name], alpha) for name, value in a.items()}


def _lerp(name: str, a: Any, b: Any, alpha: float) -> Any:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a if alpha >= 0.5 else b
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"'{name}' is {a.dtype} {tuple(a.shape)} in one and {b.dtype} {tuple(b.shape)} in the other: give state "
            "dicts of one architecture"
        )
    b = b.to(a.device)
    if not a.is_floating_point() and not a.is_complex():
        return (a if alpha >= 0.5 else b).clone()
    return torch.where(a == b, a, torch.lerp(b, a, alpha))


def _highest(heights: Any) -> float:
    return math.nan if any(math.isnan(height) for height in heights) else max(heights)
