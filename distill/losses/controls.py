"""Controls: what a teacher's numbers are worth is seen beside losses that lack them."""

import torch
from torch import Tensor

from distill.losses.logits import soft_target
from distill.losses.reduction import (
    INF,
    average,
    check_classes,
    check_logits,
    check_smoothing,
    check_valid,
    full_precision,
    label_mask,
    upcast,
    zero_invalid,
)


def label_smoothing(student: Tensor, labels: Tensor, smoothing: float = 0.1, valid: Tensor | None = None) -> Tensor:
    r"""Cross-entropy on smoothed labels: softened targets without a teacher.

    .. math:: -\sum_c \bigl((1 - s) [c = y] + s / C\bigr) \log \sigma(z)_c

    Args:
        student: Logits z [..., classes]; a class at ``-inf`` is none of the C that share the smoothing.
        labels: y, int64 [...], a class at each valid position; anything elsewhere.
        smoothing: s in [0, 1).
        valid: Bool [...], True at valid positions; all if None.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ, a label is no class, or the smoothing is out of range.

    When to use: as a control without a teacher.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, arXiv:1512.00567,
    section 7. Teachers against it: Yuan et al., CVPR 2020, arXiv:1909.11723.
    """
    check_smoothing(smoothing)
    check_valid(student, valid)
    check_classes(student)
    with full_precision(student):
        label = label_mask(labels, student, valid)
        z = zero_invalid(upcast(student), valid)
        out = z == -INF
        log_q = torch.log_softmax(z, -1)
        hard = -torch.where(label, log_q, 0.0).sum(-1)
        even = -log_q.masked_fill(out, 0.0).sum(-1) / (~out).sum(-1).clamp(min=1)
        return average((1 - smoothing) * hard + smoothing * even, valid)


def shuffled_off_class(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    valid: Tensor | None = None,
    *,
    labels: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Soft targets whose probabilities beside the label were dealt out anew, at random at every position.

    .. math:: T^2 \, \mathrm{KL}\bigl(\pi(\sigma(z^t / T)) \,\|\, \sigma(z^s / T)\bigr), \qquad \pi(y) = y

    The teacher's confidence in the label stays, and so does the entropy of the rest; which class resembles which
    ("dark knowledge") is gone. What soft targets gain over this is owed to it.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; a class at ``-inf`` takes no part and stays there.
        temperature: T > 0; the same for both.
        valid: Bool [...], True at valid positions; all if None.
        labels: y, int64 [...], a class at each valid position; anything elsewhere.
        generator: Where the chance comes from, on the logits' device; torch's own if None.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ, a label is no class, or the temperature is not positive and finite.

    When to use: as a control: keeps the teacher's confidence only.

    Source: Furlanello et al., "Born-Again Neural Networks", ICML 2018, arXiv:1805.04770, section 3.2 ("dark knowledge
    with permuted predictions", which keeps the largest instead of the labelled class).
    """
    check_logits(student, teacher, valid)
    with torch.no_grad():
        fixed = label_mask(labels, teacher, valid) | (teacher == -INF)
        chance = torch.rand(teacher.shape, generator=generator, device=teacher.device)
        # Both list the classes that may move first, by index and by chance, then the fixed ones, by index.
        places = torch.argsort(fixed.to(torch.uint8), dim=-1, stable=True)
        dealt = torch.argsort(chance.masked_fill(fixed, 2.0), dim=-1, stable=True)
        shuffled = teacher.scatter(-1, places, teacher.gather(-1, dealt))
    return soft_target(student, shuffled, temperature, valid)
