"""What a student is trained on: named terms, each a loss with a weight that may warm up and decay."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from distill.features import make_projector, matches
from distill.losses import (
    FeatureLoss,
    LogitLoss,
    LogitMSE,
    SoftTarget,
    check_alpha,
    check_temperature,
    sampled_soft_target,
)
from workbench.distributed.ranks import world
from workbench.duration import Duration
from workbench.randomness import same_random_state
from workbench.tasks import Regression, Task

Layers = str | list[str]


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Its weight after t of training is weight * min(1, t / warmup) * (1 - (1 - final) * min(1, t / decay)).

    Args:
        loss: A loss on logits or on features; the task's own loss, on labels, if None.
        weight: Its factor, at least 0. A term of weight 0 is not computed, the task's own loss is only logged.
        student: For a loss on features: the student's submodules, by path or pattern as
            :func:`distill.features.capture` takes them; of a family one for each of its members, by name.
        teacher: The teacher's, as many; those of the student if None.
        warmup: How long the weight rises linearly from 0.
        decay: How long it falls linearly to ``final`` times itself, from the start of training; it does not if None.
        final: What is left of the weight then, in [0, 1].

    Raises:
        ValueError: If a number is out of range, or layers are given without a loss on features, or none with one.
    """

    loss: LogitLoss | FeatureLoss | None = None
    weight: float = 1.0
    student: Layers | dict[str, Layers] | None = None
    teacher: Layers | None = None
    warmup: Duration = Duration(0, "it")  # noqa: RUF009 - frozen
    decay: Duration | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}: give a finite number of at least 0")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is {self.final}: the share of the weight that decay leaves is between 0 and 1")
        if self.decay is not None and self.decay.value < 1:
            raise ValueError(f"decay is {self.decay}: give at least 1it, or leave it away")
        layers = self.student is not None or self.teacher is not None
        if isinstance(self.loss, FeatureLoss) and self.student is None:
            raise ValueError(f"{type(self.loss).__name__} compares features: say which, student: layers.1")
        if layers and not isinstance(self.loss, FeatureLoss):
            kind = "the task's own loss" if self.loss is None else type(self.loss).__name__
            raise ValueError(f"{kind} compares outputs, so it takes no submodules: leave student and teacher away")

    def at(self, elapsed: Callable[[str], float]) -> float:
        """The weight now; ``elapsed("ep")`` and ``elapsed("it")`` say how many epochs and updates are done."""
        factor = self.weight
        if self.warmup.value:
            factor *= min(1.0, elapsed(self.warmup.unit) / self.warmup.value)
        if self.decay is not None:
            factor *= 1 - (1 - self.final) * min(1.0, elapsed(self.decay.unit) / self.decay.value)
        return factor


class Outputs(NamedTuple):
    """What a network showed of itself in one forward pass.

    Args:
        logits: What the task scores, [..., classes]; of a teacher None where only a sample of it is known.
        features: By concrete name.
        sample: ``ids``, ``weights`` and ``log_probs`` [..., K] of a teacher with a large vocabulary.
    """

    logits: Tensor | None
    features: Mapping[str, Tensor] = {}
    sample: tuple[Tensor, Tensor, Tensor] | None = None


def soft_and_hard(temperature: float, alpha: float) -> dict[str, Term]:
    """The objective of Hinton et al. 2015: alpha * T^2 KL(teacher || student) + (1 - alpha) * task loss.

    Raises:
        ValueError: If alpha is outside [0, 1] or the temperature is not positive.
    """
    check_alpha(alpha)
    check_temperature(temperature)
    return {"soft": Term(SoftTarget(temperature), alpha), "hard": Term(None, 1 - alpha)}


@final
class Objective(nn.Module):
    """A weighted sum of terms; its parameters are the projectors between unequal widths.

    Projectors are made by :meth:`prepare`, once the widths are known. They are trained beside the student and are no
    part of it.

    Args:
        terms: By name.
        members: The students of a family by name; one without a name if empty.

    Raises:
        ValueError: If there is no term of a weight above 0, or a term speaks of other members.
    """

    def __init__(self, terms: Mapping[str, Term], members: Sequence[str] = ("",)) -> None:
        super().__init__()
        if not any(term.weight for term in terms.values()):
            raise ValueError(f"no term of {list(terms)} has a weight above 0: there is nothing to learn from")
        if odd := [n for n in terms if n == "loss" or not n.isidentifier() or hasattr(nn.ModuleDict, n)]:
            raise ValueError(
                f"a term is called {odd[0]!r}: give it a name of letters and digits that is none of torch's own; "
                "'loss' is the sum of all"
            )
        for name, term in terms.items():
            if isinstance(term.student, dict) and set(term.student) != set(members):
                raise ValueError(
                    f"term {name!r} names the students {sorted(term.student)}: the family is {sorted(members)}"
                )
        self.terms = dict(terms)
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items() if term.loss is not None})
        self.projectors = nn.ModuleDict()
        self.register_load_state_dict_pre_hook(_without_projectors)

    @property
    def projects(self) -> bool:
        """Whether it needs projectors, made by :meth:`prepare`."""
        return any(isinstance(loss, FeatureLoss) and loss.projects for loss in self.losses.values())

    def parameters_of(self, member: str) -> Iterator[nn.Parameter]:
        """Parameters of a student's projectors."""
        mine = {_key(member, name) for name in self.terms}
        for key, projector in self.projectors.items():
            if key.rpartition("-")[0] in mine:
                yield from projector.parameters()

    def weights(self, elapsed: Callable[[str], float]) -> dict[str, float]:
        """Weight of each term now."""
        return {name: term.at(elapsed) for name, term in self.terms.items()}

    def needs_teacher(self, weights: Mapping[str, float]) -> bool:
        """Whether a term of some weight needs the teacher."""
        losses = (self.terms[name].loss for name, weight in weights.items() if weight)
        return any(isinstance(loss, FeatureLoss) or (loss is not None and loss.needs_teacher) for loss in losses)

    def needs_logits(self, weights: Mapping[str, float]) -> bool:
        """Whether a term of some weight needs the teacher's logits, not just its features."""
        losses = (self.terms[name].loss for name, weight in weights.items() if weight)
        return any(isinstance(loss, LogitLoss) and loss.needs_teacher for loss in losses)

    def student_layers(self, member: str = "", weights: Mapping[str, float] | None = None) -> list[str]:
        """What to capture of a student; of the terms with some weight now, or of all if None."""
        return self._layers(lambda term: _of(term.student, member), weights)

    def teacher_layers(self, weights: Mapping[str, float] | None = None) -> list[str]:
        """What to capture of the teacher."""
        return self._layers(_teacher_layers, weights)

    def prepare(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], member: str = "") -> None:
        """Make the projectors of a student whose features, and the teacher's, look like these.

        Raises:
            ValueError: If a term finds another number of features here and there, or they cannot be compared.
        """
        for name, term in self.terms.items():
            if not (isinstance(term.loss, FeatureLoss) and term.loss.projects):
                continue
            for index, (mine, theirs) in enumerate(self._pairs(name, member, student, teacher)):
                self.projectors[_key(member, name, str(index))] = make_projector(mine, theirs).to(mine.device)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        weights: Mapping[str, float],
        own: Callable[[Tensor], Tensor],
        valid: Tensor | None = None,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
        member: str = "",
    ) -> dict[str, Tensor]:
        """Every term that counts now, and their weighted sum as ``"loss"``.

        Args:
            student: Its logits and features, with their graph.
            teacher: The teacher's.
            weights: From :meth:`weights`.
            own: Logits -> the task's own loss.
            valid: Bool, of the logits' shape without the classes: the positions that count; all if None. Of their whole
                shape, where they are numbers that count one by one, as of a regression.
            labels: Targets at these positions, where a term needs them.
            tokens: Bool [B, L], where features have a place for each token: those that are not padding; a prompt's too.
            member: Which student of a family this is.
        """
        found: dict[str, Tensor] = {}
        total: Tensor | None = None
        idle: list[str] = []
        assert student.logits is not None
        for name, term in self.terms.items():
            weight = weights[name]
            if term.loss is None:
                value = own(student.logits if weight else student.logits.detach())
            elif not weight:
                idle += [name] if term.weight else []
                continue
            elif isinstance(term.loss, FeatureLoss):
                value = self._features(name, term.loss, student, teacher, valid, tokens, member)
            elif teacher.sample is not None and term.loss.needs_teacher:
                value = _sampled(term.loss, student.logits, teacher.sample, valid)
            else:
                if teacher.logits is None and term.loss.needs_teacher:
                    raise ValueError(f"term {name!r} compares logits, and the teacher gave none: cache them as well")
                # A loss that needs no teacher still takes a tensor in its pattern.
                logits = student.logits if teacher.logits is None else teacher.logits
                value = term.loss(*_with_classes(student.logits, logits, valid), valid, labels)
            found[name] = value
            if weight:
                # A weight of 1 leaves the value as it is, bit for bit; and 0 * NaN is NaN.
                part = value if weight == 1 else weight * value
                total = part if total is None else total + part
        if total is None or idle:
            # A term whose time has not come, or is over: data-parallel training wants every parameter to take part.
            nothing = self._nothing(student.logits, idle, member)
            total = nothing if total is None else total + nothing
        return {"loss": total, **found}

    def _nothing(self, logits: Tensor, idle: Sequence[str], member: str) -> Tensor:
        """Zero, with a graph to the student's output and to the projectors of these terms."""
        # Not the logits' sum: 0 times infinity is NaN.
        total = logits.masked_fill(~logits.isfinite(), 0).sum()
        for name in idle:
            for key, projector in self.projectors.items():
                if key.rpartition("-")[0] == _key(member, name):
                    total = sum((parameter.sum() for parameter in projector.parameters()), total)
        return 0.0 * total

    def _features(
        self,
        name: str,
        loss: FeatureLoss,
        student: Outputs,
        teacher: Outputs,
        valid: Tensor | None,
        tokens: Tensor | None,
        member: str,
    ) -> Tensor:
        values = []
        for index, (mine, theirs) in enumerate(self._pairs(name, member, student.features, teacher.features)):
            key = _key(member, name, str(index))
            if loss.projects:
                if key not in self.projectors:
                    raise ValueError(
                        f"term {name!r} has no projector yet: call prepare first, before the optimizer is made"
                    )
                mine = self.projectors[key](mine)
            values.append(loss(mine, theirs.to(mine.dtype), _fitting(mine, valid, tokens)))
        return torch.stack(values).mean()

    def _pairs(
        self, name: str, member: str, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Features of one term, the student's beside the teacher's, in the order in which they were named."""
        term = self.terms[name]
        mine, theirs = _matching(_of(term.student, member), student), _matching(_teacher_layers(term), teacher)
        if len(mine) != len(theirs) or not mine:
            raise ValueError(
                f"term {name!r} compares {len(mine)} features of the student ({', '.join(mine) or 'none'}) with "
                f"{len(theirs)} of the teacher ({', '.join(theirs) or 'none'}): name as many of each, in order"
            )
        return [(student[one], teacher[other]) for one, other in zip(mine, theirs)]

    def _layers(self, of: Callable[[Term], list[str]], weights: Mapping[str, float] | None) -> list[str]:
        terms = (term for name, term in self.terms.items() if weights is None or weights[name])
        return list(
            dict.fromkeys(pattern for term in terms if isinstance(term.loss, FeatureLoss) for pattern in of(term))
        )


def _of(layers: Layers | dict[str, Layers] | None, member: str) -> list[str]:
    if isinstance(layers, dict):
        return _of(layers[member], member)
    return [layers] if isinstance(layers, str) else list(layers or ())


def _teacher_layers(term: Term) -> list[str]:
    if term.teacher is None and isinstance(term.student, dict):
        raise ValueError("a term names its features by student: say the teacher's too, teacher: layers.3")
    return _of(term.student if term.teacher is None else term.teacher, "")


def _matching(layers: Iterable[str], features: Mapping[str, Tensor]) -> list[str]:
    """Concrete names that the layers stand for, in the order of the layers, then of the modules."""
    found = [name for pattern in layers for name in features if matches(name, pattern)]
    return list(dict.fromkeys(found))


def _fitting(feature: Tensor, valid: Tensor | None, tokens: Tensor | None) -> Tensor | None:
    """The mask that fits a feature's leading axes: of its tokens, or of the positions that the task scores."""
    masks = (mask for mask in (tokens, valid) if mask is not None)
    return next((mask for mask in masks if feature.ndim > mask.ndim and feature.shape[: mask.ndim] == mask.shape), None)


def _with_classes(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [..., classes]; numbers that count one by one are given a last axis of size 1."""
    alone = valid is not None and valid.shape == student.shape
    return (student.unsqueeze(-1), teacher.unsqueeze(-1)) if alone else (student, teacher)


def _sampled(loss: LogitLoss, logits: Tensor, sample: tuple[Tensor, Tensor, Tensor], valid: Tensor | None) -> Tensor:
    # Drawn from the teacher's own probabilities, a sample says nothing of softened ones.
    if not isinstance(loss, SoftTarget) or loss.temperature != 1 or loss.standardize:
        raise ValueError(
            f"{loss} needs all of the teacher's logits, and the cache holds a sample of them: use SoftTarget at "
            "temperature 1, or cache with store: full"
        )
    return sampled_soft_target(logits, *sample, valid=valid)


def _without_projectors(objective: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Leave the projectors of a checkpoint alone where there are none yet: the student does not need them."""
    if not objective.projectors:
        for key in [key for key in state if key.startswith(f"{prefix}projectors.")]:
            del state[key]


def _key(*parts: str) -> str:
    return "-".join(part for part in parts if part)


def objective_of(
    temperature: float, alpha: float, losses: Mapping[str, Term] | None, members: Sequence[str] = ("",)
) -> Objective:
    """The objective of ``losses``, or of soft targets and own loss; ``members`` are the students' names.

    Raises:
        ValueError: If a number is out of range, or both are given.
    """
    if losses is None:
        return Objective(soft_and_hard(temperature, alpha), members)
    if (temperature, alpha) != (4.0, 0.9):
        raise ValueError("temperature and alpha are given beside losses: say them there, in the terms")
    return Objective(losses, members)


def check_scored(objective: Objective, task: Task) -> None:
    """Refuse losses between distributions over classes where a task has no classes.

    Raises:
        ValueError: If the task is a regression and a term compares anything of the outputs but their numbers.
    """
    if not isinstance(task, Regression):
        return
    for name, term in objective.terms.items():
        if isinstance(term.loss, LogitLoss) and not (isinstance(term.loss, LogitMSE) and not term.loss.standardize):
            raise ValueError(
                f"term {name!r} is {term.loss}, which compares classes, and Regression has none: give losses, e.g. "
                "{soft: {loss: {class_path: distill.losses.LogitMSE}, weight: 0.5}, hard: {weight: 0.5}}"
            )


def make_projectors(objective: Objective, student: Outputs, teacher: Outputs) -> None:
    """Give an objective new projectors, the same on all ranks, which all call this. Nothing is drawn."""
    with same_random_state(), torch.no_grad():
        objective.prepare(student.features, teacher.features)
    objective.projectors.requires_grad_(True).train()
    if world() > 1:
        for value in objective.projectors.state_dict().values():
            torch.distributed.broadcast(value, 0)


def average_gradients(objective: Objective) -> None:
    """Make the gradients of the projectors means over all ranks. Called on every rank, after the last backward pass."""
    if (ranks := world()) == 1:
        return
    for parameter in objective.projectors.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(ranks)
