"""Distillation losses: pure functions, each also as a module. Imports torch only.

Logits are [..., classes]: summed over classes, averaged over positions. Independent labels and numbers of a regression
are of any shape: averaged over all. Features are [B, ..., width] or, as images,
[B, channels, H, W]. All compute in at least fp32, outside autocast, and give the teacher no gradient. ``valid``
marks valid positions: values at other positions, NaN included, change neither the loss nor its gradient.
"""

from distill.losses.controls import label_smoothing, shuffled_off_class
from distill.losses.elementwise import attentive_imitation, bernoulli_target, squared_error, teacher_bounded
from distill.losses.elementwise_modules import (
    AttentiveImitation,
    BernoulliTarget,
    EmbeddingCosine,
    SquaredError,
    TeacherBounded,
)
from distill.losses.features import (
    attention_relation,
    attention_transfer,
    cosine,
    hint,
    rkd,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from distill.losses.logits import dist, dkd, jsd, logit_mse, mix, reverse_kl, soft_target, standardize
from distill.losses.modules import (
    DIST,
    DKD,
    JSD,
    RKD,
    AttentionRelation,
    AttentionTransfer,
    Cosine,
    FeatureLoss,
    Hint,
    LabelSmoothing,
    LogitLoss,
    LogitMSE,
    ReverseKL,
    ShuffledOffClass,
    SimilarityPreserving,
    SoftTarget,
)
from distill.losses.reduction import check_alpha, check_classes, check_temperature
from distill.losses.sampled import sampled_soft_target

__all__ = [
    "DIST",
    "DKD",
    "JSD",
    "RKD",
    "AttentionRelation",
    "AttentionTransfer",
    "AttentiveImitation",
    "BernoulliTarget",
    "Cosine",
    "EmbeddingCosine",
    "FeatureLoss",
    "Hint",
    "LabelSmoothing",
    "LogitLoss",
    "LogitMSE",
    "ReverseKL",
    "ShuffledOffClass",
    "SimilarityPreserving",
    "SoftTarget",
    "SquaredError",
    "TeacherBounded",
    "attention_relation",
    "attention_transfer",
    "attentive_imitation",
    "bernoulli_target",
    "check_alpha",
    "check_classes",
    "check_temperature",
    "cosine",
    "dist",
    "dkd",
    "hint",
    "jsd",
    "label_smoothing",
    "logit_mse",
    "mix",
    "reverse_kl",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "sampled_soft_target",
    "shuffled_off_class",
    "similarity_preserving",
    "soft_target",
    "squared_error",
    "standardize",
    "teacher_bounded",
]
