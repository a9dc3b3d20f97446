"""Soft targets from a teacher of which only a sample of classes is known: large vocabularies, cached."""

import torch
from torch import Tensor

from distill.losses.reduction import (
    average,
    check_classes,
    check_temperature,
    check_valid,
    full_precision,
    upcast,
    zero_invalid,
)


def sampled_soft_target(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    log_probs: Tensor,
    temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Unbiased estimate of :func:`distill.losses.soft_target` from sampled classes.

    .. math:: T^2 \sum_k w_k \, (\log p_{c_k} - \log q_{c_k})

    Unbiased in value and gradient when the weights are: :math:`E \sum_k w_k f(c_k) = \sum_c p_c f(c)` for every f, as
    with N draws from p and :math:`w = count / N`, or N draws from r and :math:`w = count \, p / (N r)`. The top classes
    renormalised are not. One estimate may be negative.

    Args:
        student: Logits [..., classes].
        ids: int64 [..., K], the sampled classes c; one may come twice.
        weights: w [..., K], at least 0, with a sum of about 1; 0 for unused entries of ids.
        log_probs: log p [..., K] of the teacher at this temperature, exact: normalised over all classes.
        temperature: T > 0 at which the sample was taken; the student is softened by the same.
        valid: Bool [...], True at valid positions; all if None.

    Returns:
        A scalar in nats: sum over the sample, mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes do not fit, an id that counts is no class, or the temperature is not positive and finite.

    Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025,
    arXiv:2503.16870, section 3.4 (random sampling KD).
    """
    check_temperature(temperature)
    check_valid(student, valid)
    check_classes(student)
    for name, tensor in (("ids", ids), ("weights", weights), ("log_probs", log_probs)):
        if tensor.shape[:-1] != student.shape[:-1] or tensor.shape != ids.shape:
            raise ValueError(
                f"{name} are {list(tensor.shape)} and student logits {list(student.shape)}: a sample of K classes at "
                f"every position is needed, {[*student.shape[:-1], 'K']}"
            )
    if ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype}: int64 is needed, a class each")
    with full_precision(student):
        z = zero_invalid(upcast(student), valid) / temperature
        w, log_p = zero_invalid(upcast(weights.detach()), valid), upcast(log_probs.detach())
        log_q = _at(z, ids.masked_fill(w == 0, 0)) - torch.logsumexp(z, -1, keepdim=True)
        return average((w * torch.where(w == 0, 0.0, log_p - log_q)).sum(-1), valid, temperature)


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    try:
        return logits.gather(-1, ids)
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise ValueError(
            f"ids go from {ids.min().item()} to {ids.max().item()} and the student scores {logits.shape[-1]} classes: "
            "give it the vocabulary that the sample was taken from"
        ) from error
