"""Ids sampled from a large vocabulary estimate the teacher without bias."""

import torch

from distill.cache.sampling import draw, generator_for


def test_drawn_ids_are_what_a_naive_loop_counts() -> None:
    logits = torch.randn(7, 11)
    logits[2, 3:] = -torch.inf
    found = draw(logits, 40, generator_for(1, 2, 3))
    uniform = torch.rand(7, 40, dtype=torch.float64, generator=generator_for(1, 2, 3))
    at = 0
    for row, draws in zip(logits.double(), uniform):
        p = row.softmax(0)
        counted: dict[int, int] = {}
        for u in draws.tolist():
            total = p.tolist()[index := 0]
            while total <= u:
                total += p.tolist()[index := index + 1]
            counted[index] = counted.get(index, 0) + 1
        size = len(counted)
        assert dict(zip(found.ids[at : at + size].tolist(), found.counts[at : at + size].tolist())) == counted
        assert found.ids[at : at + size].tolist() == sorted(counted)
        assert torch.allclose(found.log_probs[at : at + size].double(), row.log_softmax(0)[sorted(counted)], atol=1e-6)
        at += size
    assert at == len(found.ids)
    assert torch.allclose(found.log_z, logits.logsumexp(1))
    assert found.sizes.sum() == at


def test_the_estimate_is_unbiased_where_the_largest_alone_are_not() -> None:
    """Over many draws the mean estimate of the cross-entropy and its gradient meets the exact one."""
    teacher, student = torch.randn(1, 50), torch.randn(50)
    p, log_q = teacher.softmax(1)[0], student.log_softmax(0)
    exact = -(p * log_q).sum()
    estimates, weights = [], torch.zeros(50)
    for trial in range(600):
        found = draw(teacher, 10, generator_for(0, trial, 0))
        weight = found.counts / 10
        estimates.append(-(weight * log_q[found.ids]).sum())
        weights[found.ids] += weight / 600
    spread = torch.stack(estimates).std() / 600**0.5
    assert abs(torch.stack(estimates).mean() - exact) < 4 * spread
    assert (weights - p).abs().max() < 0.02  # of which the gradient of the cross-entropy is linear
    top = p.topk(10)
    biased = -(top.values / top.values.sum() * log_q[top.indices]).sum()
    assert abs(biased - exact) > 4 * spread
