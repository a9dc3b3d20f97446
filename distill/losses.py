"""Distillation losses: pure functions of logits. Imports torch only.

All take logits of shape [..., classes], compute in at least fp32, sum over classes and average over positions.
"""

import torch
from torch import Tensor


def soft_target(student: Tensor, teacher: Tensor, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    r"""Soft-target loss: cross-entropy between temperature-softened outputs, as a divergence.

    .. math:: T^2 \, \mathrm{KL}\bigl(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\bigr)

    The factor :math:`T^2` keeps the gradient's scale about constant in T. The teacher gets no gradient.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; ``-inf`` marks a class that takes no probability.
        temperature: T > 0; the same for both.
        valid: Bool [...], True where a position counts; all of them if None.

    Returns:
        A scalar: sum over classes, mean over valid positions; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or the temperature is not positive and finite.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)}: same needed")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: a positive number is needed, usually 1 to 10")
    if valid is not None and (valid.shape != student.shape[:-1] or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}: bool {list(student.shape[:-1])} is needed")
    with torch.autocast(student.device.type, enabled=False):
        log_q = torch.log_softmax(_wide(student) / temperature, -1)
        log_p = torch.log_softmax(_wide(teacher.detach()) / temperature, -1)
        p = log_p.exp()
        # 0 log 0 = 0, also where the student gives such a class no probability either.
        terms = torch.where(p > 0, p * (log_p - torch.where(p > 0, log_q, 0.0)), 0.0)
        return temperature**2 * _mean(terms.sum(-1), valid)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
