"""What a weight is worth: pure functions from a weight to scores of its shape, higher is kept longer.

Scores are in fp32 whatever the weight is stored in (bf16 has 1,927 distinct magnitudes in a million weights,
so half precision would leave the choice to ties); float64 weights keep float64.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, any shape, on the weight's device.

    Reference: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
        arXiv:1506.02626.
    """
    return _precise(weight).abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), any shape; drawn on the CPU and moved to the weight's device, so devices agree.

    Only the weight's shape, device and precision matter. Pass ``seeded(seed, name)`` for draws that depend on
    nothing but the seed and the parameter's name.
    """
    precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.rand(weight.shape, generator=generator, dtype=precise).to(weight.device)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter alone: the same in every process, whatever was drawn before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Criterion:
    """A scoring function and what it must be given besides the weight.

    Attributes:
        name: what it is called in recipes and records.
        score: ``score(weight)``, or ``score(weight, generator)`` when ``needs_generator``; returns scores of
            the weight's shape.
        needs_generator: whether it draws random numbers.
        needs_data: whether it needs batches and a loss, which weights alone cannot give.
    """

    name: str
    score: Callable[..., Tensor]
    needs_generator: bool = False
    needs_data: bool = False


CRITERIA = {
    criterion.name: criterion
    for criterion in (Criterion("magnitude", magnitude), Criterion("random", random, needs_generator=True))
}


def _precise(weight: Tensor) -> Tensor:
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
