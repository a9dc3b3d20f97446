"""Criteria that need the weight alone, and checks for those that need batches."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune.masks.memory import distributed, shared_memory
from workbench.messages import some


def magnitude(weight: Tensor) -> Tensor:
    """The absolute value, of any shape, on the weight's device.

    Formula: ``|w|``.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, arXiv:1506.02626.

    When to use: the default, on trained networks and for lottery tickets. Needs no data.
    """
    return precise(weight).abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random scores, of any shape; drawn on the CPU and moved to the weight's device, so that devices agree.

    Formula: uniform in [0, 1).

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635, section 2 (random tickets).

    When to use: as the control for every other criterion.

    The scores depend on the weight's shape and precision only. With the generator ``seeded(seed, name)`` they depend on
    the seed and the parameter's name.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.rand(weight.shape, generator=generator, dtype=dtype).to(weight.device)


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter: the same in every process, independent of earlier draws."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def precise(value: Tensor) -> Tensor:
    """``value`` without its graph, in fp32, or float64 if it already is."""
    return value.detach() if value.dtype == torch.float64 else value.detach().float()


def check(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that are sharded over ranks, and parameters that share memory without being one parameter.

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
