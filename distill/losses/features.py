"""Losses on features: hidden states [B, L, D] or [B, D], and images [B, channels, H, W].

Where a loss needs equal widths, a projector makes the student as wide as the teacher first; the others compare what
does not depend on width. ``valid`` is bool over the leading axes, [B] or [B, L] (for images [B] or [B, H, W]).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.reduction import INF, average, check_weights, divergence, full_precision, unit, upcast, zero_invalid


def hint(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""FitNets' hint: mean squared difference of two features.

    .. math:: \overline{(f^s - f^t)^2}

    The paper has half of the sum over the feature.

    Args:
        student: Feature [B, ..., D] or [B, C, H, W], after its projector.
        teacher: Feature of the same shape.
        valid: Bool over leading axes, True at valid positions; all if None.

    Returns:
        A scalar: mean over the width and valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ.

    When to use: at any width, for layers of the same meaning.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, equation 3.
    """
    with full_precision(student):
        fs, ft, counts = _same(student, teacher, valid)
        return average((fs - ft).square().mean(-1), counts)


def cosine(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""One minus the cosine of the angle between two features: direction without length.

    .. math:: 1 - \frac{\langle f^s, f^t \rangle}{\lVert f^s \rVert \lVert f^t \rVert}

    Args:
        student: Feature [B, ..., D] or [B, C, H, W], after its projector; the angle is taken over D or C.
        teacher: Feature of the same shape.
        valid: Bool over leading axes, True at valid positions; all if None.

    Returns:
        A scalar from 0 to 2: mean over valid positions; 1 at a zero vector; 0 with its graph if no position is valid.

    Raises:
        ValueError: If shapes differ.

    When to use: for hidden states and embeddings.

    Source: Sanh et al., "DistilBERT", 2019, arXiv:1910.01108, section 2 (cosine embedding loss).
    """
    with full_precision(student):
        fs, ft, counts = _same(student, teacher, valid)
        return average(1 - (unit(fs, -1) * unit(ft, -1)).sum(-1), counts)


def attention_transfer(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Attention transfer: where a network is active, for any number of channels.

    .. math:: \overline{\Bigl(\frac{Q^s}{\lVert Q^s \rVert} - \frac{Q^t}{\lVert Q^t \rVert}\Bigr)^2}, \qquad
        Q = \sum_c f_c^2

    with Q over the positions of one sample. The reduction is that of the authors' code, so that their weights can be
    used here; equation 2 has the norm of the difference, not squared.

    Args:
        student: Feature [B, C, H, W] or [B, L, D].
        teacher: Feature of the same shape but for the channels.
        valid: Bool over leading axes, True at valid positions; all if None.

    Returns:
        A scalar: mean over valid positions; 0 with its graph if no position is valid.

    Raises:
        ValueError: If positions differ, or there is only one for a sample.

    When to use: for convolutional networks; no projector.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928, equation 2.
    """
    with full_precision(student):
        fs, ft, counts = _aligned(student, teacher, valid)
        if fs.ndim < 3:
            raise ValueError(f"features are {list(student.shape)}: [B, C, H, W] or [B, L, D] is needed, with positions")
        qs, qt = fs.square().sum(-1).flatten(1), ft.square().sum(-1).flatten(1)
        return average((unit(qs, -1) - unit(qt, -1)).square(), None if counts is None else counts.flatten(1))


def attention_relation(student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, heads: int = 12) -> Tensor:
    r"""MiniLMv2's self-attention relation: how the positions of a sequence relate, by queries, keys or values.

    .. math:: \mathrm{KL}\bigl(R^t \,\|\, R^s\bigr), \qquad R = \sigma\bigl(A A^\top / \sqrt{D / h}\bigr)

    for each of h relation heads, into which the width is cut: neither the number of heads nor the width of the networks
    need agree. One of the paper's three terms: call it with queries, with keys and with values, and add.

    Args:
        student: Queries, keys or values [B, L, D], their heads side by side: the output of a layer ``query``, or of one
            that makes all three at once a part of it, which :func:`distill.features.capture` names ``c_attn:query``.
        teacher: The same kind, [B, L, D'].
        valid: Bool [B] or [B, L]: the positions that count, as those that relate and those that are related to; all if
            None.
        heads: h, a divisor of D and D'.

    Returns:
        A scalar in nats: sum over positions related to, mean over heads and valid positions; 0 with its graph if none
        is valid.

    Raises:
        ValueError: If shapes do not fit, or the heads do not divide a width.

    When to use: for transformers of any width and number of heads.

    Source: Wang et al., "MiniLMv2", Findings of ACL 2021, arXiv:2012.15828, equations 4 to 6.
    """
    check_heads(heads)
    with full_precision(student):
        fs, ft, counts = _aligned(student, teacher, valid)
        if fs.ndim != 3:
            raise ValueError(f"features are {list(student.shape)}: [B, L, D] is needed, heads side by side")
        log_q, log_p = _relation(fs, counts, heads), _relation(ft, counts, heads)
        return average(divergence(log_p, log_q).mean(1), counts)


def _relation(feature: Tensor, counts: Tensor | None, heads: int) -> Tensor:
    """Log of the relation [B, heads, L, L] of a feature [B, L, D] to itself."""
    width = feature.shape[-1]
    if width % heads:
        raise ValueError(f"heads is {heads} and the width {width}: relation heads divide it evenly, in both networks")
    split = feature.unflatten(-1, (heads, width // heads)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
    if counts is not None:
        # A sequence of which nothing counts keeps all its positions: a softmax of nothing is NaN.
        apart = ~counts & counts.any(-1, keepdim=True)
        scores = scores.masked_fill(apart[:, None, None, :], -INF)
    return torch.log_softmax(scores, -1)


def similarity_preserving(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Which samples of a batch are alike, for features of any shape.

    .. math:: \frac{1}{b^2} \lVert G^s - G^t \rVert_F^2, \qquad G = A A^\top \text{ with rows of norm 1}

    A is [b, everything]. It relates the samples of one call: a batch in pieces gives another value.

    Args:
        student: Feature [B, ...].
        teacher: Feature [B, ...], of any other shape.
        valid: Bool over leading axes of both: invalid positions are 0, samples without a valid one are left out.

    Returns:
        A scalar: sum over pairs divided by the squared number of valid samples; 0 with its graph if there is none.

    Raises:
        ValueError: If the features are not of as many samples.

    When to use: for features of different shapes.

    Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, equations 2 to 4.
    """
    with full_precision(student):
        fs, ft, counts = _samples(student, teacher, valid)
        gs, gt = unit(fs @ fs.T, -1), unit(ft @ ft.T, -1)
        return (gs - gt).square().sum() / counts.sum().clamp(min=1) ** 2


def rkd_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Relational distillation by distance: how far apart the samples of a batch are, in units of their mean distance.

    .. math:: \frac{1}{b^2} \sum_{i \ne j} l\Bigl(\frac{d^s_{ij}}{\mu^s}, \frac{d^t_{ij}}{\mu^t}\Bigr), \qquad
        d_{ij} = \lVert f_i - f_j \rVert

    with Huber's l (quadratic up to 1) and mu the mean distance of two samples. Divided by b^2 as in the authors' code.

    Args:
        student: Feature [B, ...], flattened.
        teacher: Feature [B, ...], of any other shape.
        valid: Bool over leading axes of both: invalid positions are 0, samples without a valid one are left out.

    Returns:
        A scalar: sum over pairs divided by the squared number of valid samples; 0 with its graph if there is none.

    Raises:
        ValueError: If the features are not of as many samples.

    When to use: for embeddings and retrieval.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, equations 5 to 7.
    """
    with full_precision(student):
        fs, ft, counts = _samples(student, teacher, valid)
        pairs = counts.unsqueeze(0) & counts.unsqueeze(1) & ~torch.eye(len(fs), dtype=torch.bool, device=fs.device)
        huber = F.smooth_l1_loss(_distances(fs, pairs), _distances(ft, pairs), reduction="none")
        return huber.masked_fill(~pairs, 0.0).sum() / counts.sum().clamp(min=1) ** 2


def _distances(feature: Tensor, pairs: Tensor) -> Tensor:
    """Distances between rows over their mean; as they are where all are 0."""
    distance = torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.masked_fill(~pairs, 0.0).sum() / pairs.sum().clamp(min=1)
    return distance / torch.where(mean > 0, mean, 1.0)


def rkd_angle(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Relational distillation by angle: the angle at which one sample sees two others.

    .. math:: \frac{1}{b^3} \sum_{ijk} l(\cos \angle^s_{ijk}, \cos \angle^t_{ijk})

    with Huber's l (quadratic up to 1). Divided by b^3 as in the authors' code. Needs memory for [B, B, width].

    Args:
        student: Feature [B, ...], flattened.
        teacher: Feature [B, ...], of any other shape.
        valid: Bool over leading axes of both: invalid positions are 0, samples without a valid one are left out.

    Returns:
        A scalar: sum over triples divided by the cubed number of valid samples; 0 with its graph if there is none.

    Raises:
        ValueError: If the features are not of as many samples.

    When to use: for embeddings and retrieval.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, equations 8 and 9.
    """
    with full_precision(student):
        fs, ft, counts = _samples(student, teacher, valid)
        triples = counts[:, None, None] & counts[:, None] & counts
        huber = F.smooth_l1_loss(_angles(fs), _angles(ft), reduction="none")
        return huber.masked_fill(~triples, 0.0).sum() / counts.sum().clamp(min=1) ** 3


def _angles(feature: Tensor) -> Tensor:
    """Cosines [j, i, k] of the angles at row j between rows i and k."""
    seen = unit(feature.unsqueeze(0) - feature.unsqueeze(1), -1)
    return seen @ seen.transpose(-1, -2)


def rkd(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, distance: float = 1.0, angle: float = 2.0
) -> Tensor:
    """Relational distillation by both: distance * :func:`rkd_distance` + angle * :func:`rkd_angle`.

    Args:
        student: Feature [B, ...], flattened.
        teacher: Feature [B, ...], of any other shape.
        valid: Bool over leading axes of both: invalid positions are 0, samples without a valid one are left out.
        distance: Weight of the distances, at least 0; at 0 they are not computed.
        angle: Weight of the angles, at least 0; the authors take twice that of the distances.

    Raises:
        ValueError: If the features are not of as many samples, or the weights are negative or both 0.
    """
    check_relations(distance, angle)
    parts = [(distance, rkd_distance), (angle, rkd_angle)]
    return torch.stack([weight * part(student, teacher, valid) for weight, part in parts if weight]).sum()


def check_relations(distance: float, angle: float) -> None:
    """Raises: ValueError: unless both weights are at least 0, and one above."""
    check_weights(distance=distance, angle=angle)
    if not distance and not angle:
        raise ValueError("distance and angle are both 0: give one of them a weight")


def check_heads(heads: int) -> None:
    """Raises: ValueError: unless there is a relation head."""
    if heads < 1:
        raise ValueError(f"heads is {heads}: at least one relation head is needed, usually 12 to 64")


def _aligned(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both features with their channels last, blank where they do not count, and which positions do."""
    fs, ft = _channels_last(upcast(student)), _channels_last(upcast(teacher.detach()))
    if fs.shape[:-1] != ft.shape[:-1]:
        raise ValueError(
            f"student features are {list(student.shape)} and the teacher's {list(teacher.shape)}: "
            "take them where both networks have the same positions"
        )
    counts = _positions(fs, valid)
    return zero_invalid(fs, counts), zero_invalid(ft, counts), counts


def _same(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    fs, ft, counts = _aligned(student, teacher, valid)
    if fs.shape != ft.shape:
        raise ValueError(
            f"the student's features are {fs.shape[-1]} wide and the teacher's {ft.shape[-1]}: "
            "project the student's first, e.g. with distill.features.make_projector"
        )
    return fs, ft, counts


def _samples(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both features as [B, everything], 0 where they do not count, and which samples do."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"student features are {list(student.shape)} and the teacher's {list(teacher.shape)}: "
            "both need a batch of the same samples first, [B, ...]"
        )
    fs, ft = _channels_last(upcast(student)), _channels_last(upcast(teacher.detach()))
    counts = _positions(fs, valid)
    some = torch.ones(len(fs), dtype=torch.bool, device=fs.device)
    if counts is not None:
        some = counts.reshape(len(fs), -1).any(-1)
    return zero_invalid(fs, counts).flatten(1), zero_invalid(ft, _positions(ft, valid)).flatten(1), some


def _channels_last(feature: Tensor) -> Tensor:
    return feature.movedim(1, -1) if feature.ndim == 4 else feature


def _positions(feature: Tensor, valid: Tensor | None) -> Tensor | None:
    """``valid`` for every position of a feature whose channels are last."""
    if valid is None:
        return None
    places = feature.shape[:-1]
    if valid.dtype != torch.bool or not 1 <= valid.ndim <= len(places) or valid.shape != places[: valid.ndim]:
        raise ValueError(
            f"valid is {valid.dtype} {list(valid.shape)}: bool over leading axes of {list(places)} is needed"
        )
    return valid.reshape(*valid.shape, *[1] * (len(places) - valid.ndim)).expand(places)
