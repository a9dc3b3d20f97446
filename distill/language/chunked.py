"""Soft and hard loss of language models a few tokens at a time. Torch only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.losses import check_alpha, check_classes, check_temperature
from workbench.models.positions import IGNORED


def chunked_soft_target(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    valid: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    r"""The loss of distillation from hidden states and lm heads, a few tokens at a time.

    .. math:: \alpha T^2 \mathrm{KL}\bigl(\sigma(W^t h^t / T) \,\|\, \sigma(W^s h^s / T)\bigr)
              + (1 - \alpha) \bigl(-\log \sigma(W^s h^s)_y\bigr)

    The same in value and gradient as both heads followed by :func:`distill.losses.soft_target` and cross-entropy, but
    no tensor of [tokens, vocabulary] is ever held: the forward pass computes the gradients chunk by chunk and leaves
    invalid tokens out of the matrix products. Softmax in at least fp32; gradients of half-precision weights
    are summed in fp32. The teacher gets no gradient, and a second derivative is refused.

    Args:
        student_hidden: [..., D]; already shifted for a causal model.
        student_weight: [V, D], of the lm head.
        teacher_hidden: [..., E].
        teacher_weight: [V, E]. Cut padded heads to the vocabulary: ``weight[:vocabulary]``.
        temperature: T > 0 of the soft targets; cross-entropy has none.
        labels: y, int64 [...]; needed for alpha < 1.
        alpha: Weight of the soft targets, in [0, 1]; at the ends the other term is not computed.
        valid: Bool [...], True at valid tokens; by default where the label is not -100, or everywhere.
        student_bias: [V]; -inf for a row that takes no probability.
        teacher_bias: [V].
        chunk: Tokens at a time. Memory beyond the weights' gradient is about 5 x chunk x V numbers.

    Returns:
        A scalar in nats: mean over valid tokens; 0 with its graph if there is none.

    Raises:
        ValueError: If shapes do not fit, labels are missing or out of range where they count, or a number is out of
            range.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2; gradients in the forward pass after Hsu et al.,
        "Liger Kernel", 2024, arXiv:2410.10989, section 3.2.
    """
    check_alpha(alpha)
    student = FactoredLogits(student_hidden, student_weight, student_bias)
    teacher = FactoredLogits(teacher_hidden, teacher_weight, teacher_bias)
    weights = (alpha, 1 - alpha)
    _check(student, teacher, labels, weights, valid)
    if valid is None and labels is not None:
        valid = labels != IGNORED
    total, _, _ = chunked_terms(
        student,
        teacher,
        weights,
        temperature=temperature,
        labels=labels if alpha < 1 else None,
        valid=valid,
        chunk=chunk,
    )
    return total


class FactoredLogits(NamedTuple):
    """Logits that are not computed yet: ``hidden @ weight.T + bias``.

    Args:
        hidden: Hidden states [..., D].
        weight: [V, D], of the lm head.
        bias: [V]; -inf for a row that takes no probability.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def chunked_terms(
    student: FactoredLogits,
    teacher: FactoredLogits,
    weights: tuple[float, float],
    *,
    temperature: float,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`chunked_soft_target` with any two weights.

    Args:
        student: Its hidden states [..., D] and lm head.
        teacher: Its hidden states [..., E] and lm head over the same vocabulary.
        weights: Of the soft targets and of the cross-entropy, at least 0; soft targets of weight 0 are not computed.
        temperature: T > 0 of the soft targets.
        labels: int64 [...]; needed for a cross-entropy of weight above 0. With them it is computed also at weight 0.
        valid: Bool [...], as for :func:`chunked_soft_target`.
        chunk: Tokens at a time.

    Returns:
        The weighted sum, with its graph; the soft-target loss and the cross-entropy for logging, 0 if not computed.

    Raises:
        ValueError: As :func:`chunked_soft_target`.
    """
    check_temperature(temperature)
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights are {weights}: give finite numbers of at least 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give at least 1 token at a time")
    _check(student, teacher, labels, weights, valid)
    if valid is None and labels is not None:
        valid = labels != IGNORED
    hs, ht = student.hidden.flatten(0, -2), teacher.hidden.detach().flatten(0, -2)
    y = None if labels is None else labels.flatten()
    if valid is not None:
        # Invalid positions are dropped before the matrix products: this saves time, and a NaN there reaches nothing.
        kept = valid.flatten().nonzero().squeeze(1)
        hs, ht, y = hs[kept], ht[kept], None if y is None else y[kept]
    if y is not None and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < len(student.weight):
        raise ValueError(
            f"labels that count are {int(y.min())} to {int(y.max())}: give 0 to {len(student.weight) - 1}, "
            f"or leave the others out by {IGNORED} or valid"
        )
    settings = _Settings(temperature, weights, chunk, torch.is_grad_enabled())
    terms: Any = _Chunked.apply(
        hs, student.weight, student.bias, ht, teacher.weight.detach(), teacher.bias, y, settings
    )
    return terms


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _Settings(NamedTuple):
    temperature: float
    weights: tuple[float, float]
    chunk: int
    grad: bool


class _Chunked(torch.autograd.Function):
    """Mean loss over the valid tokens. Forward also computes the gradients; backward only scales them.

    Shapes: hs [N, D], ws [V, D], bs [V], ht [N, E], wt [V, E], bt [V], y [N].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hs: Tensor,
        ws: Tensor,
        bs: Tensor | None,
        ht: Tensor,
        wt: Tensor,
        bt: Tensor | None,
        y: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hs.device.type
        casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = casts or ws.dtype
        wide = torch.float64 if torch.float64 in (ws.dtype, wt.dtype) else torch.float32
        need_h, need_w, need_b = (settings.grad and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            student, teacher = _cast(ws, bs, dtype), _cast(wt, bt, wt.dtype)
            gh = torch.empty_like(hs) if need_h else None
            gw = torch.zeros_like(ws, dtype=wide) if need_w else None
            gb = torch.zeros_like(bs, dtype=wide) if need_b and bs is not None else None
            terms = torch.zeros(2, dtype=wide, device=hs.device)
            for start in range(0, len(hs), settings.chunk):
                rows = slice(start, start + settings.chunk)
                h = hs[rows].to(dtype)
                zs = nn.functional.linear(h, *student).to(wide)
                zt = nn.functional.linear(ht[rows].to(teacher.weight.dtype), *teacher) if settings.weights[0] else None
                gz = _logit_gradient(
                    zs, None if zt is None else zt.to(wide), None if y is None else y[rows], settings, terms
                )
                if gb is not None:
                    gb += gz.sum(0)
                gz = gz.to(dtype)
                if gh is not None:
                    gh[rows] = gz @ student.weight
                if gw is not None and gw.dtype == dtype:
                    gw.addmm_(gz.t(), h)
                elif gw is not None:
                    gw += gz.t() @ h
        ctx.save_for_backward(gh, gw, gb)
        ctx.count = max(len(hs), 1)
        ctx.dtypes = (hs.dtype, ws.dtype, None if bs is None else bs.dtype)
        soft, hard = terms / ctx.count
        ctx.mark_non_differentiable(soft, hard)
        return settings.weights[0] * soft + settings.weights[1] * hard, soft, hard

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_soft_target has no second derivative, and backward was called with create_graph=True: "
                "use distill.losses.soft_target on logits"
            )
        # Divided only here, after a loss scale that keeps small numbers from vanishing in fp16.
        scale = grad_outputs[0] / ctx.count
        gradients = [
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*gradients, None, None, None, None, None)


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Head:
    return _Head(weight.to(dtype), None if bias is None else bias.to(dtype))


def _logit_gradient(zs: Tensor, zt: Tensor | None, y: Tensor | None, settings: _Settings, terms: Tensor) -> Tensor:
    """Gradient of a chunk's loss by ``zs`` [C, V]; adds its summed losses to ``terms``. Overwrites both logits."""
    t, (alpha, beta) = settings.temperature, settings.weights
    gradient = None
    if y is not None and not beta:
        terms[1] += (torch.logsumexp(zs, -1) - zs.gather(1, y[:, None]).squeeze(1)).sum()
    elif y is not None:
        log_q = torch.log_softmax(zs, -1)
        terms[1] -= log_q.gather(1, y[:, None]).sum()
        gradient = log_q.exp_()
        gradient[torch.arange(len(y), device=y.device), y] -= 1
        gradient *= beta
    if zt is not None:
        log_q, log_p = torch.log_softmax(zs.div_(t), -1), torch.log_softmax(zt.div_(t), -1)
        p = log_p.exp()
        ratio = log_p.sub_(log_q)
        # 0 log 0 = 0, also where the student gives such a class no probability either.
        ratio.masked_fill_(p == 0, 0.0)
        soft = log_q.exp_().sub_(p)
        terms[0] += t**2 * p.mul_(ratio).sum()
        gradient = soft.mul_(alpha * t) if gradient is None else gradient.add_(soft, alpha=alpha * t)
    return torch.zeros_like(zs) if gradient is None else gradient


def _check(
    student: FactoredLogits,
    teacher: FactoredLogits,
    labels: Tensor | None,
    weights: tuple[float, float],
    valid: Tensor | None,
) -> None:
    shape = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != shape:
        raise ValueError(
            f"student hidden states are {list(student.hidden.shape)} and the teacher's {list(teacher.hidden.shape)}: "
            "run both on the same tokens"
        )
    for role, logits in (("student", student), ("teacher", teacher)):
        if logits.weight.ndim != 2 or logits.hidden.shape[-1] != logits.weight.shape[1]:
            raise ValueError(
                f"the {role}'s hidden states are {list(logits.hidden.shape)} and its weight "
                f"{list(logits.weight.shape)}: give [..., D] and [V, D]"
            )
        if logits.bias is not None and logits.bias.shape != logits.weight.shape[:1]:
            raise ValueError(
                f"{role}_bias is {list(logits.bias.shape)}: give [{len(logits.weight)}], one number a token"
            )
    if len(student.weight) != len(teacher.weight):
        raise ValueError(
            f"the student's head has {len(student.weight)} rows and the teacher's {len(teacher.weight)}: compare their "
            "tokens (check_vocabulary) and cut both to the vocabulary, weight[:vocabulary]"
        )
    check_classes(student.weight.t())
    if weights[1] and labels is None:
        raise ValueError(f"alpha is {weights[0]} without labels: give labels, or alpha=1 for soft targets alone")
    if labels is not None and labels.shape != shape:
        raise ValueError(f"labels are {list(labels.shape)}: give {list(shape)}, one a token")
    if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}: bool {list(shape)} is needed")
