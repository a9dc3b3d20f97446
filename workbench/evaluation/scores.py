"""Scores of a classifier's logits: accuracy, calibration, agreement with its teacher.

Pure functions of whole tensors, and `Scores`, which sees a split batch by batch. Logits are [..., C], labels and
``valid`` [...]; ``valid`` is True at the positions that count, and the others, NaN too, are not read.
Everything is computed and summed in float64. Over no position the functions give NaN.
"""

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

BINS = 15
_CHUNK = 2**22  # numbers widened to float64 at a time, 32 MiB: a language model's logits do not fit


class _Positions(NamedTuple):
    """Valid positions: logits [N, C] in float64, labels [N], the teacher's logits [N, C] in float64 if it has any."""

    logits: Tensor
    labels: Tensor
    teacher: Tensor | None


def accuracy(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of positions whose largest logit is the label's, in [0, 1]; of equal logits the first counts."""
    return _mean(_right(part) for part in _positions(logits, labels, None, valid))


def nll(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of -log p_y in nats, p = softmax(logits), from 0."""
    return _mean(_nll(part) for part in _positions(logits, labels, None, valid))


def brier(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over positions of sum_c (p_c - [c = y])^2, from 0 to 2.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78(1).
    """
    return _mean(_brier(part) for part in _positions(logits, labels, None, valid))


def ece(logits: Tensor, labels: Tensor, valid: Tensor | None = None, bins: int = BINS) -> Tensor:
    """Expected calibration error: sum_b n_b / n |accuracy_b - confidence_b|, in [0, 1].

    Positions fall into ``bins`` bins of equal width by their largest probability; bin b is ((b - 1) / bins, b / bins].
    It depends on the bins and on n, and is biased upwards on few samples: compare it at equal n only.

    Raises:
        ValueError: If there is not at least one bin.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", arXiv:1706.04599, eq. 3.
    """
    sums = sum((_binned(part, bins) for part in _positions(logits, labels, None, valid)), _no_bins(bins))
    return _ece(sums.to(logits.device))


def agreement(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of positions at which both have their largest logit in the same class, in [0, 1]."""
    return _mean(_agree(part) for part in _positions(student, None, teacher, valid))


def kl(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of KL(teacher || student) = sum_c t_c log(t_c / s_c) in nats, at temperature 1, from 0.

    A class that the teacher rules out, logit -inf, adds nothing; one that only the student rules out makes it infinite.
    """
    return _mean(_kl(part) for part in _positions(student, None, teacher, valid))


def recall(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """For each class the share of its positions that are given to it, [C], in [0, 1]; NaN for a class without any."""
    counts = logits.new_zeros(2, logits.shape[-1], dtype=torch.float64)
    for part in _positions(logits, labels, None, valid):
        counts += _by_class(part)
    return counts[1] / counts[0]


@final
class Scores:
    """All scores of one network on one split, batch by batch.

    Args:
        bins: Of the calibration error.

    Raises:
        ValueError: If there is not at least one bin.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = _no_bins(bins)
        self._sums: dict[str, float] = {}
        self._classes = torch.zeros(2, 0, dtype=torch.float64)
        self._taught: bool | None = None

    @property
    def count(self) -> int:
        """Positions seen."""
        return int(self._bins[0].sum())

    def update(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: [..., C].
            labels: Class numbers, [...].
            teacher_logits: [..., C]; with every batch or with none.
            valid: Positions that count, [...]; all if None.

        Raises:
            ValueError: If shapes do not fit, a label is no class, or only some batches come with a teacher.
        """
        if self._taught not in (None, teacher_logits is not None):
            raise ValueError("teacher_logits came with some batches and not with others: give it with all or none")
        for part in _positions(logits, labels, teacher_logits, valid):
            classes, before = part.logits.shape[-1], self._classes.shape[1]
            if before not in (0, classes):
                raise ValueError(f"logits have {classes} classes, earlier batches had {before}: score one network")
            self._taught = teacher_logits is not None
            scores = {"accuracy": _right(part), "nll": _nll(part), "brier": _brier(part)}
            if part.teacher is not None:
                scores |= {"agreement": _agree(part), "kl": _kl(part)}
            for name, values in scores.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())
            self._bins = self._bins + _binned(part, self._bins.shape[1]).cpu()
            self._classes = _by_class(part).cpu() + (self._classes if before else 0)

    def compute(self) -> dict[str, float]:
        """``accuracy``, ``nll``, ``brier``, ``ece``, and with a teacher ``agreement`` and ``kl``; see the functions.

        Raises:
            ValueError: If no valid position was seen.
        """
        if not self.count:
            raise ValueError("no valid position was seen: give batches with at least one before asking for scores")
        means = {name: total / self.count for name, total in self._sums.items()}
        order = ("accuracy", "nll", "brier", "ece", "agreement", "kl")
        means["ece"] = float(_ece(self._bins))
        return {name: means[name] for name in order if name in means}

    def per_class(self) -> tuple[Tensor, Tensor]:
        """Positions of each class and how many of them are right, both float64 [C]."""
        return self._classes[0].clone(), self._classes[1].clone()


def _positions(
    logits: Tensor, labels: Tensor | None, teacher: Tensor | None, valid: Tensor | None
) -> Iterator[_Positions]:
    """The valid positions, a bounded number at a time."""
    shape, classes = logits.shape[:-1], logits.shape[-1] if logits.dim() else 0
    if classes < 1:
        raise ValueError(f"logits are {list(logits.shape)}: give [..., C] with the classes last")
    if teacher is not None and teacher.shape != logits.shape:
        raise ValueError(f"the teacher's logits are {list(teacher.shape)}, the student's {list(logits.shape)}")
    for name, other in (("labels", labels), ("valid", valid)):
        if other is not None and other.shape != shape:
            raise ValueError(f"{name} are {list(other.shape)} for logits {list(logits.shape)}: give {list(shape)}")
    keep = None if valid is None else valid.flatten().bool()
    flat = torch.zeros(shape, dtype=torch.int64, device=logits.device) if labels is None else labels
    flat, logits = flat.flatten(), logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
    teacher = None if teacher is None else teacher.reshape(logits.shape)
    wrong = (flat < 0) | (flat >= classes)
    if bool((wrong if keep is None else wrong & keep).any()):
        invalid = sorted(set(flat[wrong if keep is None else wrong & keep].tolist()))[:3]
        raise ValueError(
            f"labels {', '.join(map(str, invalid))} are no classes, which are 0 to {classes - 1}: "
            "mark positions that do not count in valid"
        )
    step = max(1, _CHUNK // classes)
    for first in range(0, len(flat), step):
        part = slice(first, first + step)
        rows = slice(None) if keep is None else keep[part]
        yield _Positions(
            logits[part][rows].detach().double(),
            flat[part][rows],
            None if teacher is None else teacher[part][rows].detach().double(),
        )


def _mean(parts: Iterator[Tensor]) -> Tensor:
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for part in parts:
        total, count = total.to(part.device) + part.sum(), count + part.numel()
    return total / count


def _right(part: _Positions) -> Tensor:
    return (part.logits.argmax(-1) == part.labels).double()


def _nll(part: _Positions) -> Tensor:
    return -part.logits.log_softmax(-1).gather(-1, part.labels[:, None])[:, 0]


def _brier(part: _Positions) -> Tensor:
    probabilities = part.logits.softmax(-1)
    probabilities[torch.arange(len(part.labels), device=part.labels.device), part.labels] -= 1
    return probabilities.square().sum(-1)


def _agree(part: _Positions) -> Tensor:
    assert part.teacher is not None, "callers give one"
    return (part.logits.argmax(-1) == part.teacher.argmax(-1)).double()


def _kl(part: _Positions) -> Tensor:
    assert part.teacher is not None, "callers give one"
    wanted, found = part.teacher.log_softmax(-1), part.logits.log_softmax(-1)
    weight = wanted.exp()
    # 0 log 0 = 0: a class without probability must not bring in inf - inf.
    return torch.where(weight > 0, weight * (wanted - found), 0.0).sum(-1)


def _no_bins(bins: int) -> Tensor:
    if bins < 1:
        raise ValueError(f"bins is {bins}: give at least 1")
    return torch.zeros(3, bins, dtype=torch.float64)


def _binned(part: _Positions, bins: int) -> Tensor:
    """For each bin the number of positions, the sum of their confidences and how many are right, [3, bins]."""
    confidence = part.logits.softmax(-1).amax(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    place = torch.bucketize(confidence, edges)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
    return sums.index_add_(1, place, torch.stack([torch.ones_like(confidence), confidence, _right(part)]))


def _ece(sums: Tensor) -> Tensor:
    return (sums[2] - sums[1]).abs().sum() / sums[0].sum()


def _by_class(part: _Positions) -> Tensor:
    """For each class the number of its positions and how many are right, [2, C]."""
    sums = torch.zeros(2, part.logits.shape[-1], dtype=torch.float64, device=part.logits.device)
    return sums.index_add_(1, part.labels, torch.stack([torch.ones_like(right := _right(part)), right]))
