"""Every loss in one table: its function under one signature, its oracle and its module."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill import losses
from tests.helpers import oracles

Call = Callable[[Tensor, Tensor, float, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Logit:
    """A loss on logits.

    Args:
        call: (student, teacher, temperature, valid, labels) -> loss.
        oracle: The same in loops.
        module: Temperature -> the same as a module.
        softens: Whether T is in it.
        zero_when_equal: Whether the loss is 0 if student and teacher are equal.
        relates: Whether it compares positions with each other, so that the loss of a batch is no mean over its parts.
        draws: Whether it draws random numbers.
    """

    call: Call
    oracle: Callable[[Tensor, Tensor, float, Tensor | None, Tensor], float]
    module: Callable[[float], losses.LogitLoss]
    softens: bool = True
    zero_when_equal: bool = True
    relates: bool = False
    draws: bool = False


def _shuffled(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor) -> Tensor:
    chance = torch.Generator().manual_seed(3)
    return losses.shuffled_off_class(student, teacher, temperature, valid, labels=labels, generator=chance)


def _shuffled_oracle(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None, labels: Tensor
) -> float:
    """The same chance, dealt in loops."""
    chance = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(3))
    dealt = teacher.clone().reshape(-1, teacher.shape[-1])
    for z, draw, y in zip(dealt, chance.reshape(-1, teacher.shape[-1]), labels.reshape(-1).tolist()):
        free = [c for c in range(len(z)) if c != y and z[c] > -oracles.INF]
        order = sorted(free, key=lambda c: draw[c].item())
        z[free] = z[order].clone()
    return oracles.soft_target(student, dealt.view_as(teacher), temperature, valid)


LOGIT = {
    "soft_target": Logit(
        lambda s, t, T, v, y: losses.soft_target(s, t, T, v),
        lambda s, t, T, v, y: oracles.soft_target(s, t, T, v),
        losses.SoftTarget,
    ),
    "reverse_kl": Logit(
        lambda s, t, T, v, y: losses.reverse_kl(s, t, T, v),
        lambda s, t, T, v, y: oracles.reverse_kl(s, t, T, v),
        losses.ReverseKL,
    ),
    "jsd": Logit(
        lambda s, t, T, v, y: losses.jsd(s, t, T, v, beta=0.3),
        lambda s, t, T, v, y: oracles.jsd(s, t, T, v, 0.3),
        lambda T: losses.JSD(T, 0.3),
    ),
    "logit_mse": Logit(
        lambda s, t, T, v, y: losses.logit_mse(s, t, v),
        lambda s, t, T, v, y: oracles.logit_mse(s, t, v),
        lambda T: losses.LogitMSE(),
        softens=False,
    ),
    "dkd": Logit(
        lambda s, t, T, v, y: losses.dkd(s, t, T, v, labels=y, alpha=0.7, beta=3),
        lambda s, t, T, v, y: oracles.dkd(s, t, y, T, v, 0.7, 3),
        lambda T: losses.DKD(T, 0.7, 3),
    ),
    "dist": Logit(
        lambda s, t, T, v, y: losses.dist(s, t, T, v, inter=2, intra=0.5),
        lambda s, t, T, v, y: oracles.dist(s, t, T, v, 2, 0.5),
        lambda T: losses.DIST(T, 2, 0.5),
        relates=True,
    ),
    "label_smoothing": Logit(
        lambda s, t, T, v, y: losses.label_smoothing(s, y, 0.2, v),
        lambda s, t, T, v, y: oracles.label_smoothing(s, y, 0.2, v),
        lambda T: losses.LabelSmoothing(0.2),
        softens=False,
        zero_when_equal=False,
    ),
    "shuffled_off_class": Logit(
        _shuffled, _shuffled_oracle, losses.ShuffledOffClass, zero_when_equal=False, draws=True
    ),
}


@dataclass(frozen=True)
class Feature:
    """A loss on features.

    Args:
        call: (student, teacher, valid) -> loss.
        oracle: (student, teacher, valid) of [B, L, D] -> the same in loops.
        module: The same as a module.
        relates: Whether it compares samples with each other.
    """

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    oracle: Callable[[Tensor, Tensor, Tensor | None], float]
    module: losses.FeatureLoss
    relates: bool = False


def _by_sample(oracle: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor, Tensor | None], float]:
    """Of [b, D]: positions that do not count are 0, samples without any are left out."""

    def call(student: Tensor, teacher: Tensor, valid: Tensor | None) -> float:
        if valid is not None:
            some = valid.any(-1)
            student = torch.where(valid[..., None], student, 0.0)[some]
            teacher = torch.where(valid[..., None], teacher, 0.0)[some]
        return oracle(student.flatten(1), teacher.flatten(1))

    return call


FEATURE = {
    "hint": Feature(losses.hint, oracles.hint, losses.Hint()),
    "cosine": Feature(losses.cosine, oracles.cosine, losses.Cosine()),
    "attention_transfer": Feature(losses.attention_transfer, oracles.attention_transfer, losses.AttentionTransfer()),
    "attention_relation": Feature(
        lambda s, t, v: losses.attention_relation(s, t, v, heads=2),
        lambda s, t, v: oracles.attention_relation(s, t, 2, v),
        losses.AttentionRelation(heads=2),
    ),
    "similarity_preserving": Feature(
        losses.similarity_preserving,
        _by_sample(oracles.similarity_preserving),
        losses.SimilarityPreserving(),
        relates=True,
    ),
    "rkd_distance": Feature(losses.rkd_distance, _by_sample(oracles.rkd_distance), losses.RKD(1, 0), relates=True),
    "rkd_angle": Feature(losses.rkd_angle, _by_sample(oracles.rkd_angle), losses.RKD(0, 1), relates=True),
    "rkd": Feature(
        losses.rkd,
        lambda s, t, v: _by_sample(oracles.rkd_distance)(s, t, v) + 2 * _by_sample(oracles.rkd_angle)(s, t, v),
        losses.RKD(),
        relates=True,
    ),
}
