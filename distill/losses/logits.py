"""Losses on logits [..., classes]: sum over classes, mean over positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.losses.reduction import (
    INF,
    average,
    by_class,
    check_alpha,
    check_beta,
    check_classes,
    check_logits,
    check_pair,
    check_temperature,
    check_valid,
    check_weights,
    divergence,
    full_precision,
    label_mask,
    soften,
    unit,
    upcast,
    valid_rows,
    varies,
    zero_invalid,
)


def soft_target(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    valid: Tensor | None = None,
    *,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Soft-target loss: the divergence of the student from the teacher, both softened by a temperature.

    .. math:: T^2 \, \mathrm{KL}\bigl(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\bigr)

    The factor :math:`T^2` keeps the gradient's scale about constant in T. The teacher gets no gradient.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; ``-inf`` marks a class that takes no probability.
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None. Values at other positions, NaN included, change neither
            the loss nor its gradient.
        class_weights: w, one a class, at least 0: a position counts :math:`\sum_c w_c \, \sigma(z^t)_c` times, the
            weight that the teacher expects there; equal if None. The mean stays one over positions, as that of torch's
            cross-entropy on probabilities, which this is if the teacher is certain. Inside the sum over classes, where
            Chen et al. 2017 (NeurIPS, section 3.2) have them, they would move the optimum away from the teacher.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ or the temperature is not positive and finite.

    When to use: first; the student covers all of the teacher's classes.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    check_temperature(temperature)
    check_logits(student, teacher, valid)
    (student, teacher), valid = valid_rows(valid, student, teacher)
    with full_precision(student):
        log_q, log_p = soften(student, teacher, temperature, valid)
        return average(by_class(divergence(log_p, log_q), teacher, class_weights, valid), valid, temperature)


def mix(soft: Tensor, hard: Tensor, alpha: float) -> Tensor:
    """The loss of distillation: alpha * soft + (1 - alpha) * hard.

    At the ends it is the one loss alone: a term of weight 0 cannot make it NaN.

    Args:
        soft: Loss against the teacher, its factor T^2 included; a scalar.
        hard: Loss against the labels; a scalar.
        alpha: Weight of ``soft``, in [0, 1].

    Raises:
        ValueError: If alpha is outside [0, 1].
    """
    check_alpha(alpha)
    if alpha in (0, 1):
        return soft if alpha else hard
    return alpha * soft + (1 - alpha) * hard


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    *,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Reverse KL: seeks one mode of the teacher, where soft targets cover all modes.

    .. math:: T^2 \, \mathrm{KL}\bigl(\sigma(z^s / T) \,\|\, \sigma(z^t / T)\bigr)

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; a class at ``-inf`` is left out of both distributions, since any
            probability that a student gave it would cost infinitely much.
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None.
        class_weights: One a class, at least 0, as for :func:`soft_target`; equal if None.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ or the temperature is not positive and finite.

    When to use: if the student is too small to cover every mode, as in text generation.

    Source: Gu, Dong, Wei, Huang, "MiniLLM", ICLR 2024, arXiv:2306.08543, section 2.1.
    """
    check_temperature(temperature)
    check_logits(student, teacher, valid)
    (student, teacher), valid = valid_rows(valid, student, teacher)
    with full_precision(student):
        log_q, log_p = soften(student.masked_fill(teacher == -INF, -INF), teacher, temperature, valid)
        return average(by_class(divergence(log_q, log_p), teacher, class_weights, valid), valid, temperature)


def jsd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    *,
    beta: float = 0.5,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence: between covering the teacher's modes and seeking one of them.

    .. math:: T^2 \bigl(\beta \, \mathrm{KL}(p \,\|\, m) + (1 - \beta) \, \mathrm{KL}(q \,\|\, m)\bigr), \quad
        m = \beta p + (1 - \beta) q, \quad p = \sigma(z^t / T), \quad q = \sigma(z^s / T)

    At beta 0 it is KL(p || q) and at beta 1 it is KL(q || p). These are the limits of the value divided by beta and by
    1 - beta: near the ends the value itself goes to 0, so beta 0 is not the neighbour of beta 0.01. At most T^2 log 2
    at beta 1/2.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; ``-inf`` marks a class that takes no probability (at beta 1 it is left out of
            both, see :func:`reverse_kl`).
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None.
        beta: Weight of the teacher in the mixture, in [0, 1].
        class_weights: One a class, at least 0, as for :func:`soft_target`; equal if None.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ, the temperature is not positive and finite, or beta is outside [0, 1].

    When to use: to trade covering modes for seeking one.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), ICLR 2024, arXiv:2306.13649, equation 1.
    """
    check_beta(beta)
    if beta in (0, 1):
        return (reverse_kl if beta else soft_target)(student, teacher, temperature, valid, class_weights=class_weights)
    check_temperature(temperature)
    check_logits(student, teacher, valid)
    (student, teacher), valid = valid_rows(valid, student, teacher)
    with full_precision(student):
        log_q, log_p = soften(student, teacher, temperature, valid)
        # A class that neither takes has no mixture: the gradient of logaddexp(-inf, -inf) is NaN.
        nowhere = (log_p == -INF) & (log_q == -INF)
        log_m = torch.logaddexp(
            log_p.masked_fill(nowhere, 0.0) + math.log(beta), log_q.masked_fill(nowhere, 0.0) + math.log1p(-beta)
        )
        values = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
        return average(by_class(values, teacher, class_weights, valid), valid, temperature)


def logit_mse(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Squared distance of the logits, without softmax or temperature.

    .. math:: \lVert z^s - z^t \rVert^2

    Soft targets go to 1 / (2 classes) of it as T grows, both logits centred (Hinton et al. 2015, equation 4).

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; a class at ``-inf`` is left out.
        valid: Bool [...], True at valid positions; all if None.

    Returns:
        A scalar: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ.

    When to use: in place of a high temperature.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014, arXiv:1312.6184, equation 1; Kim et al.,
    "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI 2021,
    arXiv:2105.08919, equation 2.
    """
    check_pair(student, teacher, valid)
    (student, teacher), valid = valid_rows(valid, student, teacher)
    with full_precision(student):
        zs, zt = zero_invalid(upcast(student), valid), zero_invalid(upcast(teacher.detach()), valid)
        return average(torch.where(zt == -INF, 0.0, zs - zt).square().sum(-1), valid)


def dkd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    valid: Tensor | None = None,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Decoupled distillation: separate weights for the label's probability and for those of the other classes.

    .. math:: T^2 \bigl(\alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s)\bigr)

    with :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax over the classes other than the label y. Soft targets
    are alpha 1 and beta :math:`1 - p^t_y`. The complement :math:`1 - p_y` is formed in log space: a teacher that is
    certain to the last bit does not overflow.

    Args:
        student: Logits [..., classes], two classes at least.
        teacher: Logits of the same shape; ``-inf`` marks a class that takes no probability.
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None.
        labels: int64 [...], a class at each valid position; anything elsewhere.
        alpha: Weight of the labelled class against the rest (TCKD), at least 0.
        beta: Weight of the rest among themselves (NCKD), at least 0.
        class_weights: One a class, at least 0, as for :func:`soft_target`; equal if None.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ, a label is no class, the temperature is not positive and finite, a weight is
            negative, or there is one class only.

    When to use: if a confident teacher hides how it ranks the other classes.

    Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, equation 7.
    """
    check_temperature(temperature)
    check_weights(alpha=alpha, beta=beta)
    check_logits(student, teacher, valid)
    with full_precision(student):
        label = label_mask(labels, student, valid)
        zs = zero_invalid(upcast(student), valid) / temperature
        zt = zero_invalid(upcast(teacher.detach()), valid) / temperature
        others_s, others_t = zs.masked_fill(label, -INF), zt.masked_fill(label, -INF)
        sure = divergence(_label_or_not(zt, others_t, label), _label_or_not(zs, others_s, label))
        # If the teacher gives every other class probability 0, there is no distribution over them to match.
        no_others = (others_t == -INF).all(-1, keepdim=True)
        others_s, others_t = others_s.masked_fill(no_others, 0.0), others_t.masked_fill(no_others, 0.0)
        shares = divergence(torch.log_softmax(others_t, -1), torch.log_softmax(others_s, -1))
        values = by_class(alpha * sure + beta * shares, teacher, class_weights, valid)
        return average(values, valid, temperature)


def _label_or_not(logits: Tensor, others: Tensor, label: Tensor) -> Tensor:
    """Log-probabilities [..., 2] of the labelled class and of all others together."""
    total = torch.logsumexp(logits, -1)
    return torch.stack([torch.where(label, logits, 0.0).sum(-1) - total, torch.logsumexp(others, -1) - total], -1)


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    r"""DIST: matches the teacher by Pearson correlation, over the classes and over the batch.

    .. math:: T^2 \bigl(\beta \, \overline{1 - \rho(p^s_{i\cdot}, p^t_{i\cdot})}
        + \gamma \, \overline{1 - \rho(p^s_{\cdot j}, p^t_{\cdot j})}\bigr)

    with Pearson's rho, averaged over positions i and over classes j. Where the teacher is constant there is no
    relation, and the term is 0. The factor T^2 is that of the authors' code, so that their weights can be used here; a
    correlation does not shrink as T grows, though, so the gradient grows about as T^2: lower the weights when raising
    T. The second term relates the positions of one call: a batch in pieces gives another value.

    Args:
        student: Logits [..., classes]; all axes but the last are the batch.
        teacher: Logits of the same shape; a class at ``-inf`` is left out of the correlations.
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None.
        inter: beta, weight of the relations between classes, at least 0.
        intra: gamma, weight of the relations within a class over the batch, at least 0.

    Returns:
        A scalar without unit, from 0 to 2 T^2 (inter + intra); 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ, the temperature is not positive and finite, or a weight is negative.

    When to use: if the teacher is much stronger than the student.

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
    arXiv:2205.10536, equations 8 to 10.
    """
    check_temperature(temperature)
    check_weights(inter=inter, intra=intra)
    check_logits(student, teacher, valid)
    (student, teacher), valid = valid_rows(valid, student, teacher)
    with full_precision(student):
        log_q, log_p = soften(student, teacher, temperature, valid)
        classes = student.shape[-1]
        q, p = log_q.exp().reshape(-1, classes), log_p.exp().reshape(-1, classes)
        counts = None if valid is None else valid.reshape(-1)
        kept = log_p.reshape(-1, classes) > -INF
        kept = kept if counts is None else kept & counts.unsqueeze(-1)
        over_classes = average(_one_minus_pearson(q, p, kept, -1), counts, temperature)
        over_batch = average(_one_minus_pearson(q, p, kept, 0), kept.any(0), temperature)
        return inter * over_classes + intra * over_batch


def _one_minus_pearson(q: Tensor, p: Tensor, kept: Tensor, dim: int) -> Tensor:
    """1 - Pearson's correlation along an axis, of what is kept; 0 where p is constant."""

    def centred(values: Tensor) -> Tensor:
        mean = values.sum(dim, keepdim=True) / kept.sum(dim, keepdim=True).clamp(min=1)
        return (values - mean).masked_fill(~kept, 0.0)

    q, p = q.masked_fill(~kept, 0.0), p.masked_fill(~kept, 0.0)
    cq, cp = centred(q), centred(p)
    uq = unit(cq, dim, torch.linalg.vector_norm(q, dim=dim, keepdim=True))
    up = unit(cp, dim, torch.linalg.vector_norm(p, dim=dim, keepdim=True))
    return torch.where(varies(cp, p, dim), 1 - (uq * up).sum(dim), 0.0)


def standardize(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Logit standardisation: z-scores over the classes, to be given to any of the losses in the logits' place.

    .. math:: (z - \bar z) / \sigma(z), \qquad \sigma(z)^2 = \tfrac 1 C \sum_c (z_c - \bar z)^2

    Student and teacher then agree up to a shift and a scale per position; T then sets how soft both are. The
    authors' code has C - 1 instead of C in the deviation, as if the temperature were higher by sqrt(C / (C - 1)).

    Args:
        logits: [..., classes]; a class at ``-inf`` stays there and counts neither in mean nor in deviation.
        valid: Bool [...], True where a position counts, as given to the loss; all of them if None.

    Returns:
        A tensor of the same shape, at least float32, with its gradient; zeros where all logits are equal, and where a
        position does not count.

    Raises:
        ValueError: If ``valid`` is of another form.

    Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427,
    algorithm 1.
    """
    check_valid(logits, valid)
    check_classes(logits)
    with full_precision(logits):
        z = zero_invalid(upcast(logits), valid)
        out = z == -INF
        count = (~out).sum(-1, keepdim=True).clamp(min=1)
        z = z.masked_fill(out, 0.0)
        centred = (z - z.sum(-1, keepdim=True) / count).masked_fill(out, 0.0)
        size = torch.linalg.vector_norm(z, dim=-1, keepdim=True).detach()
        return (unit(centred, -1, size) * count.to(z.dtype).sqrt()).masked_fill(out, -INF)
