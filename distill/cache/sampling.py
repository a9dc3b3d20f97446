"""A teacher's distribution over a large vocabulary, stored as a few sampled ids: unbiased, unlike its top k.

For any function f, sum_i weight_i f(id_i) has the expectation sum_v p_v f(v) with p = softmax(logits). So the cross-
entropy of a student and its gradient are estimated without bias. The renormalised top k is biased: it moves the
probability of the tail onto the head.

Source: Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv:2503.16870.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class SampledIds(NamedTuple):
    """Ids sampled at P positions, concatenated; ascending within a position.

    Args:
        ids: int32 [N].
        counts: How often each id was sampled, int32 [N]; they sum to the number of draws at every position.
        log_probs: Exact log-probability of each id, its logit minus log Z; float32 [N].
        sizes: Number of distinct ids at each position, int64 [P].
        log_z: log sum exp of the position's logits, float32 [P].
    """

    ids: Tensor
    counts: Tensor
    log_probs: Tensor
    sizes: Tensor
    log_z: Tensor


def draw(logits: Tensor, samples: int, generator: torch.Generator) -> SampledIds:
    """Draw ``samples`` ids with replacement from softmax(logits) at every position, in float64, on the CPU.

    Args:
        logits: [P, V]; ``-inf`` marks an id that is never sampled.
        samples: Draws at each position, at least 1.
        generator: On the CPU.
    """
    wide = logits.detach().cpu().double()
    log_z = torch.logsumexp(wide, -1)
    cumulated = (wide - log_z[:, None]).exp().cumsum(-1)
    uniform = torch.rand(len(wide), samples, dtype=torch.float64, generator=generator)
    # Inverse transform sampling: the first id whose cumulative probability exceeds u, never one of probability 0.
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    # Rounding may point past the last id with a probability above 0.
    last = (cumulated < cumulated[:, -1:]).sum(-1, keepdim=True)
    drawn = torch.minimum(drawn, last).sort(-1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    ids, sizes = drawn[new], new.sum(-1)
    starts = torch.cat([new.flatten().nonzero().flatten(), torch.tensor([drawn.numel()])])
    positions = torch.arange(len(wide)).repeat_interleave(sizes)
    log_probs = wide[positions, ids] - log_z[positions]
    return SampledIds(ids.int(), starts.diff().int(), log_probs.float(), sizes, log_z.float())


def generator_for(seed: int, sample: int, view: int) -> torch.Generator:
    """A CPU generator seeded by (seed, sample, view) alone: the ids of a sample do not depend on the batch."""
    hashed = hashlib.blake2b(f"{seed} {sample} {view}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed, "little") >> 1)
