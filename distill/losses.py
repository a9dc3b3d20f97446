"""Distillation losses: pure functions of logits. Imports torch only.

All take logits of shape [..., classes], compute in at least fp32, sum over classes and average over positions.
"""

import torch
from torch import Tensor


def soft_target(student: Tensor, teacher: Tensor, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    r"""Soft-target loss: the divergence of the student from the teacher, both softened by a temperature.

    .. math:: T^2 \, \mathrm{KL}\bigl(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\bigr)

    The factor :math:`T^2` keeps the gradient's scale about constant in T. The teacher gets no gradient.

    Args:
        student: Logits [..., classes].
        teacher: Logits of the same shape; ``-inf`` marks a class that takes no probability.
        temperature: T > 0; the same for both.
        valid: Bool [...], True where a position counts; all of them if None. What stands elsewhere, NaN included,
            changes neither the value nor the gradient.

    Returns:
        A scalar in nats: sum over classes, mean over valid positions; 0 with its graph if none is valid.

    Raises:
        ValueError: If shapes differ or the temperature is not positive and finite.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """
    check_temperature(temperature)
    _check_shapes(student, teacher, valid)
    with torch.autocast(student.device.type, enabled=False):
        zs, zt = _wide(student), _wide(teacher.detach())
        if valid is not None:
            # Before the softmax, not after: its gradient multiplies by what stood there, and 0 * NaN is NaN.
            skipped = ~valid.unsqueeze(-1)
            zs, zt = zs.masked_fill(skipped, 0.0), zt.masked_fill(skipped, 0.0)
        log_q, log_p = torch.log_softmax(zs / temperature, -1), torch.log_softmax(zt / temperature, -1)
        p = log_p.exp()
        # 0 log 0 = 0, also where the student gives such a class no probability either.
        divergence = (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)
        count = max(divergence.numel(), 1) if valid is None else valid.sum().clamp(min=1)
        return temperature**2 * divergence.sum() / count


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


def check_temperature(temperature: float) -> None:
    """Raises: ValueError: unless the temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: a positive number is needed, usually 1 to 10")


def check_alpha(alpha: float) -> None:
    """Raises: ValueError: unless alpha is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: the weight of the soft targets is between 0 and 1")


def _check_shapes(student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
    if student.shape != teacher.shape:
        if student.shape[:-1] == teacher.shape[:-1]:
            raise ValueError(
                f"the student scores {student.shape[-1]} classes and the teacher {teacher.shape[-1]}: "
                "give them outputs over the same classes"
            )
        raise ValueError(
            f"student logits are {list(student.shape)} and teacher logits {list(teacher.shape)}: "
            "ask both about the same inputs"
        )
    if valid is not None and (valid.shape != student.shape[:-1] or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}: bool {list(student.shape[:-1])} is needed")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
