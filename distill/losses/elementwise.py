"""Losses on outputs of which every number counts by itself: independent labels, and a regression's numbers.

Outputs and ``valid`` have one shape, such as [B], [B, labels] or [B, labels, H, W]; the mean is over valid elements.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.reduction import (
    INF,
    average,
    check_elements,
    check_temperature,
    check_weights,
    divergence,
    full_precision,
    upcast,
)


def bernoulli_target(student: Tensor, teacher: Tensor, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    r"""Soft targets for independent labels: each a yes or no by a sigmoid of its own, softened by a temperature.

    .. math:: T^2 \, \mathrm{KL}\bigl(b^t \,\|\, b^s\bigr), \qquad b = (\sigma(z / T), \sigma(-z / T))

    For binary classifiers, of one logit, and for multi-label ones: a softmax over labels would compare their
    differences only. One logit z is two classes at logits (z, 0): this is :func:`distill.losses.soft_target` of these.

    Args:
        student: Logits of any shape, one a label.
        teacher: Logits of the same shape; ``-inf`` and ``inf`` are labels that it is certain of.
        temperature: T > 0; the same for both.
        valid: Bool of the same shape, True at labels that count; all if None. Values elsewhere, NaN included, change
            neither the loss nor its gradient.

    Returns:
        A scalar in nats: mean over valid labels; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or the temperature is not positive and finite.

    When to use: first, for binary and multi-label classifiers.

    Source: Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, arXiv:2308.06453, section 3.2 (multi-label
    logits distillation: each label a binary problem), with the temperature of Hinton et al. 2015, arXiv:1503.02531.
    """
    check_temperature(temperature)
    check_elements(student, teacher, valid)
    with full_precision(student):
        log_p, log_q = (_log_bernoulli(_filled(z, valid) / temperature) for z in (teacher.detach(), student))
        return average(divergence(log_p, log_q), valid, temperature)


def _log_bernoulli(logits: Tensor) -> Tensor:
    """Log-probabilities [..., 2] of yes and no."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)


def squared_error(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, scale: float | Sequence[float] = 1.0
) -> Tensor:
    r"""Squared difference of two regressions' outputs, each relative to its scale.

    .. math:: \overline{\bigl((y^s - y^t) / \sigma\bigr)^2}

    Outputs in unlike units, or of unlike spread, count alike if their scales are the standard deviations of the
    training targets: the loss is then the share of their variance that is missed, and does not depend on the units.

    Args:
        student: Numbers of any shape.
        teacher: Numbers of the same shape.
        valid: Bool of the same shape, True at numbers that count; all if None.
        scale: sigma > 0, for all, or one for each entry of the last axis.

    Returns:
        A scalar: mean over valid numbers; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or a scale is not positive and finite.

    When to use: first, for regression.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014, arXiv:1312.6184, equation 1; the scale as the
    noise of a task in Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115, equation 5.
    """
    check_scale(scale)
    check_elements(student, teacher, valid)
    with full_precision(student):
        error = _filled(student, valid) - _filled(teacher.detach(), valid)
        if not isinstance(scale, float | int):
            if error.shape[-1:] != (len(scale),):
                raise ValueError(f"scale has {len(scale)} numbers and outputs are {list(student.shape)}: give one each")
            return average((error / error.new_tensor(scale)).square(), valid)
        return average((error / scale).square(), valid)


def teacher_bounded(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, labels: Tensor, margin: float = 0.0
) -> Tensor:
    r"""Teacher-bounded regression: the student's error counts only where it is not below the teacher's by a margin.

    .. math:: \overline{e^s \, [e^s + m > e^t]}, \qquad e = (y^\cdot - y)^2

    A teacher's numbers may be wrong without bound: it is no target here, but says when the student is good enough. The
    paper adds it at weight 1/2 to the loss on labels. It takes one norm over the four numbers of a box; here each
    number is one by itself.

    Args:
        student: Numbers of any shape.
        teacher: Numbers of the same shape.
        valid: Bool of the same shape, True at numbers that count; all if None.
        labels: The true numbers, of the same shape; anything where none counts.
        margin: m, at least 0, in the squared unit of the numbers.

    Returns:
        A scalar in the squared unit of the numbers: mean over valid numbers; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or the margin is negative.

    When to use: if the teacher of a regression is not much better than the student can become.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation",
    NeurIPS 2017, section 3.3 (knowledge distillation for regression with teacher bounds).
    """
    check_weights(margin=margin)
    check_elements(student, teacher, valid)
    _check_targets(student, labels)
    with full_precision(student):
        y = _filled(labels, valid)
        es = (_filled(student, valid) - y).square()
        et = (_filled(teacher.detach(), valid) - y).square()
        return average(torch.where(es.detach() + margin > et, es, 0.0), valid)


def attentive_imitation(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, labels: Tensor, spread: float
) -> Tensor:
    r"""Attentive imitation: the squared difference from the teacher, less where the teacher is wrong.

    .. math:: \overline{\Phi \, (y^s - y^t)^2}, \qquad \Phi = \max\bigl(0, 1 - (y^t - y)^2 / \eta\bigr)

    Args:
        student: Numbers of any shape.
        teacher: Numbers of the same shape.
        valid: Bool of the same shape, True at numbers that count; all if None.
        labels: y, the true numbers, of the same shape; anything where none counts.
        spread: eta > 0: the range of the teacher's squared errors, largest less smallest, over the training set.

    Returns:
        A scalar in the squared unit of the numbers: mean over valid numbers; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or the spread is not positive and finite.

    When to use: if the teacher of a regression is good on some samples and far off on others.

    Source: Saputra, de Gusmao, Almalioglu, Markham, Trigoni, "Distilling Knowledge From a Deep Pose Regressor Network",
    ICCV 2019, arXiv:1908.00858, section 4 (attentive imitation loss).
    """
    check_spread(spread)
    check_elements(student, teacher, valid)
    _check_targets(student, labels)
    with full_precision(student):
        y, yt = _filled(labels, valid), _filled(teacher.detach(), valid)
        trust = (1 - (yt - y).square() / spread).clamp(min=0)
        return average(trust * (_filled(student, valid) - yt).square(), valid)


def check_scale(scale: float | Sequence[float]) -> None:
    """Raises: ValueError: unless each scale is positive and finite."""
    scales = [scale] if isinstance(scale, float | int) else list(scale)
    if not scales or not all(0 < each < INF for each in scales):
        raise ValueError(f"scale is {scale}: give positive numbers, such as the targets' standard deviations")


def check_spread(spread: float) -> None:
    """Raises: ValueError: unless the spread is positive and finite."""
    if not 0 < spread < INF:
        raise ValueError(f"spread is {spread}: give a positive number, the range of the teacher's squared errors")


def _check_targets(student: Tensor, labels: Tensor) -> None:
    if labels.shape != student.shape:
        raise ValueError(f"labels are {list(labels.shape)}: numbers {list(student.shape)} are needed")


def _filled(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """In at least float32, 0 where a number does not count: there 0 * NaN would be NaN."""
    return upcast(tensor) if valid is None else upcast(tensor).masked_fill(~valid, 0.0)
