"""What public implementations compute, restated, and in what they differ: T^2, divisors, guards of divisions.

Benchmarks compare with the packages themselves.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill import losses


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(*shape, dtype=torch.float64), 3 * torch.randn(*shape, dtype=torch.float64)


def test_torchdistill_has_the_soft_target_without_its_square() -> None:
    """torchdistill 1.1.5, KDLoss: T^2 comes in only along with labels and alpha."""
    student, teacher = pair(8, 10)
    theirs = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    assert torch.allclose(losses.soft_target(student, teacher, 4.0), 16 * theirs)


def test_a_mean_over_all_numbers_is_smaller_by_the_classes() -> None:
    """``F.kl_div(reduction="mean")`` and ``F.mse_loss`` divide by the classes as well."""
    student, teacher = pair(8, 100)
    # Spelled out: torch warns of the reduction.
    theirs = 16 * F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none").mean()
    assert torch.allclose(losses.soft_target(student, teacher, 4.0), 100 * theirs)
    assert torch.allclose(losses.logit_mse(student, teacher), 100 * F.mse_loss(student, teacher))


def test_a_batchmean_of_sequences_is_larger_by_their_length() -> None:
    """``batchmean`` divides by the first axis: of [B, L, V] by B."""
    student, teacher = pair(3, 7, 10)
    theirs = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert torch.allclose(losses.soft_target(student, teacher, 1.0), theirs / 7)


def test_trl_has_the_same_divergence_without_the_square() -> None:
    """trl, GKD: the mixture by logsumexp, kl_div with both in logs, no T^2; mean over tokens where there are labels."""
    student, teacher = pair(3, 7, 10)
    valid, beta = torch.rand(3, 7) < 0.7, 0.3
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), 0)
    toward, away = (F.kl_div(log_m, one, reduction="none", log_target=True) for one in (log_p, log_q))
    theirs = (beta * toward + (1 - beta) * away)[valid].sum() / valid.sum()
    assert torch.allclose(losses.jsd(student, teacher, 2.0, valid, beta=beta), 4 * theirs)


def test_mdistiller_has_the_same_decoupled_loss_from_probabilities() -> None:
    """mdistiller, DKD: log of summed probabilities, and 1000 subtracted from the labelled logit. Where those hold."""
    student, teacher = pair(8, 10)
    labels = torch.randint(10, (8,))
    label = F.one_hot(labels, 10).double()
    q, p = (student / 4).softmax(1), (teacher / 4).softmax(1)
    two_q, two_p = (torch.stack([(x * label).sum(1), (x * (1 - label)).sum(1)], 1) for x in (q, p))
    sure = F.kl_div(two_q.log(), two_p, reduction="sum") * 16 / 8
    rest_q, rest_p = student / 4 - 1000 * label, teacher / 4 - 1000 * label
    rest = F.kl_div(rest_q.log_softmax(1), rest_p.softmax(1), reduction="sum") * 16 / 8
    assert torch.allclose(losses.dkd(student, teacher, labels=labels), sure + 8 * rest)


def test_the_authors_of_dist_guard_their_division() -> None:
    """The same but for 1e-8 beside the product of norms, which is felt where probabilities are small themselves."""
    student, teacher = pair(8, 10)
    q, p = (student / 2).softmax(1), (teacher / 2).softmax(1)

    def unlike(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    theirs = 4 * (unlike(q, p) + unlike(q.T, p.T))
    assert torch.allclose(losses.dist(student, teacher, 2.0), theirs, rtol=1e-4)
    assert not torch.equal(losses.dist(student, teacher, 2.0), theirs)


def test_the_authors_of_standardisation_take_another_deviation() -> None:
    """C - 1 instead of C: their T is ours by sqrt(C / (C - 1)); and 1e-7 beside the deviation."""
    student, teacher = pair(8, 10)
    theirs = [(z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True)) for z in (student, teacher)]
    ours = losses.soft_target(losses.standardize(student), losses.standardize(teacher), 2 * (10 / 9) ** 0.5)
    assert torch.allclose(losses.soft_target(*theirs, 2.0), ours * 9 / 10)


def test_torch_has_the_same_label_smoothing() -> None:
    student, labels = torch.randn(8, 10), torch.tensor([0, -100, 3, 4, 9, -100, 1, 2])
    theirs = F.cross_entropy(student, labels, label_smoothing=0.1, ignore_index=-100)
    ours = losses.label_smoothing(student, labels.clamp(min=0), 0.1, labels >= 0)
    assert torch.allclose(ours, theirs)


def test_attention_transfer_in_the_code_and_in_the_paper() -> None:
    """The authors' code has the mean of squares, as here; equation 2 the norm, as torchdistill's mode "paper"."""
    student, teacher = torch.randn(4, 6, 5, 3), torch.randn(4, 2, 5, 3)
    maps = [F.normalize(image.square().mean(1).flatten(1)) for image in (student, teacher)]
    found = losses.attention_transfer(student, teacher)
    assert torch.allclose(found, (maps[0] - maps[1]).square().mean())
    one = losses.attention_transfer(student[:1], teacher[:1])
    assert torch.allclose((15 * one).sqrt(), (maps[0][0] - maps[1][0]).norm(), atol=1e-6)


def test_torchdistill_normalises_similarities_otherwise() -> None:
    """Its SPKDLoss calls ``normalize(gram, 1)``, where 1 is the norm, not the axis; equation 3 has the 2-norm."""
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    for power, same in ((2, True), (1, False)):
        grams = [F.normalize(f @ f.T, power, dim=1) for f in (student, teacher)]
        theirs = (grams[0] - grams[1]).norm() ** 2 / 36
        assert torch.allclose(losses.similarity_preserving(student, teacher), theirs) == same


def test_relations_are_as_in_torchdistill() -> None:
    """RKDLoss (mean), whose divisors are b^2 and b^3, the diagonals counted."""
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    distances = [torch.cdist(f, f) for f in (student, teacher)]
    distances = [d / d[d > 0].mean() for d in distances]
    assert torch.allclose(losses.rkd_distance(student, teacher), F.smooth_l1_loss(*distances))
    seen = [F.normalize(f.unsqueeze(0) - f.unsqueeze(1), dim=2) for f in (student, teacher)]
    assert torch.allclose(losses.rkd_angle(student, teacher), F.smooth_l1_loss(*(s @ s.mT for s in seen)))


def test_torch_has_the_same_hint_and_cosine() -> None:
    student, teacher = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    assert torch.allclose(losses.hint(student, teacher), F.mse_loss(student, teacher))
    assert torch.allclose(losses.cosine(student, teacher), (1 - F.cosine_similarity(student, teacher, dim=-1)).mean())
    flat = student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(20)
    assert torch.allclose(losses.cosine(student, teacher), F.cosine_embedding_loss(*flat))
