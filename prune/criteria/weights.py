"""What a weight alone tells of its worth, and which weights can be looked at through batches."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed, shared_memory
from workbench.messages import some


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``, any shape, on the weight's device.

    Reference: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
        arXiv:1506.02626.
    """
    return precise(weight).abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), any shape; drawn on the CPU and moved to the weight's device, so devices agree.

    Only the weight's shape, device and precision matter. Pass ``seeded(seed, name)`` for draws that depend on
    nothing but the seed and the parameter's name.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.rand(weight.shape, generator=generator, dtype=dtype).to(weight.device)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter alone: the same in every process, whatever was drawn before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def precise(value: Tensor) -> Tensor:
    """``value`` without its graph, in fp32, or float64 if it is that."""
    return value.detach() if value.dtype == torch.float64 else value.detach().float()


def check(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that are not whole on this rank, and what is tied by memory alone.

    Raises:
        ValueError: naming them.
    """
    if not weights:
        raise ValueError("there are no weights to score: give at least one, by name")
    sharded = [name for name, weight in weights.items() if distributed(weight)]
    if sharded:
        raise ValueError(
            f"{some(sharded)} are sharded (DTensor), and a sharded model gives no gradients or inputs of single "
            "batches: score the model before fully_shard, or sum up criterion.online over training steps"
        )
    of = {id(weight): name for name, weight in weights.items()}
    for group in shared_memory(model):
        views = {id(parameter): name for name, parameter in group}
        if len(views) > 1 and views.keys() & of.keys():
            raise ValueError(
                f"{some(views.values())} are several parameters in one memory, so none of them sees all that the "
                "weight does: make them one parameter (b.weight = a.weight), or exclude them"
            )
