"""What a student minimises: a weighted sum of named terms, whose weights may warm up and decay."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from distill.features import make_projector, matches
from distill.fused import check_relation
from distill.losses import AttentionRelation, FeatureLoss, LogitLoss, SoftTarget, check_classes, sampled_soft_target
from distill.terms import Layers, Losses, Progress, SoftTargets, Term, check_kind
from workbench.distributed.ranks import world_size
from workbench.randomness import same_random_state
from workbench.tasks import Kind, OutputType
from workbench.tasks.outputs import output_type


class Outputs(NamedTuple):
    """Outputs of a network for one batch.

    Args:
        logits: The outputs in scored form, see :class:`workbench.tasks.OutputType`; None where they are not needed or
            only a sample is known.
        features: Captured features by name.
        sample: ``ids``, ``weights`` and ``log_probs`` [..., K] of a teacher with a large vocabulary, see
            :mod:`distill.cache.sampling`.
    """

    logits: Tensor | None
    features: Mapping[str, Tensor] = {}
    sample: tuple[Tensor, Tensor, Tensor] | None = None


@final
class Objective(nn.Module):
    """A weighted sum of terms. Its parameters are the projectors between features of unequal widths.

    :meth:`resolve` says what the outputs are, which decides the soft loss of :class:`SoftTargets` and which losses
    there may be. :meth:`prepare` makes the projectors once the widths are known. They train beside the student and are
    not part of it. Projectors are named MEMBER-TERM-INDEX, without MEMBER for a single student.

    Args:
        losses: Soft targets, or terms by name.
        members: The names of a family of students; one student without a name by default.
        outputs: What the outputs are, or their kind; None where only a first batch tells, see :meth:`resolve`.

    Raises:
        ValueError: If no term has a weight above 0, a term's name is reserved, a term names other members, or a loss
            does not go with ``outputs``.
    """

    def __init__(
        self, losses: Losses, members: Sequence[str] = ("",), outputs: OutputType | Kind | None = None
    ) -> None:
        terms = losses.terms() if isinstance(losses, SoftTargets) else dict(losses)
        super().__init__()
        if not any(term.weight for term in terms.values()):
            raise ValueError(f"no term of {list(terms)} has a weight above 0: there is nothing to learn from")
        if reserved := [n for n in terms if n == "loss" or not n.isidentifier() or hasattr(nn.ModuleDict, n)]:
            raise ValueError(
                f"a term is called {reserved[0]!r}: give it a name of letters and digits that is none of torch's own; "
                "'loss' is the sum of all"
            )
        for name, term in terms.items():
            if isinstance(term.student, dict) and set(term.student) != set(members):
                raise ValueError(
                    f"term {name!r} names the students {sorted(term.student)}: the family is {sorted(members)}"
                )
        self.terms = terms
        self.losses = _losses_of(terms)
        self.outputs: OutputType | None = None
        self._soft_targets = losses if isinstance(losses, SoftTargets) else None
        if outputs is not None:
            self.resolve(output_type(outputs))
        self.projectors = nn.ModuleDict()
        self.register_load_state_dict_pre_hook(_without_projectors)

    def resolve(self, outputs: OutputType) -> OutputType:
        """Fix what the outputs are, before the first step.

        A trainer calls it with what an argument, the task, the configuration or the first batch says
        (:func:`workbench.tasks.outputs.infer`), then brings the outputs of student and teacher to scored form by
        :meth:`workbench.tasks.OutputType.scored`. Later calls with the same change nothing.

        Returns:
            ``outputs``.

        Raises:
            ValueError: If they were something else before, or a term compares outputs of another kind.
        """
        if self.outputs == outputs:
            return outputs
        if self.outputs is not None:
            raise ValueError(f"the outputs are {outputs}, and were {self.outputs} before: they stay the same")
        terms = self.terms if self._soft_targets is None else self._soft_targets.terms(outputs.kind)
        for name, term in terms.items():
            if isinstance(term.loss, LogitLoss) and not term.on_layers:
                check_kind(name, term.loss, outputs.kind)
        self.terms, self.losses, self.outputs = terms, _losses_of(terms), outputs
        return outputs

    @property
    def compares_outputs(self) -> bool:
        """Whether a term compares the networks' outputs, so that it must be known what these are."""
        return any(isinstance(term.loss, LogitLoss) and not term.on_layers for term in self.terms.values())

    @property
    def projects(self) -> bool:
        """Whether it needs projectors, made by :meth:`prepare`."""
        return any(isinstance(loss, FeatureLoss) and loss.projects for loss in self.losses.values())

    def parameters_of(self, member: str) -> Iterator[nn.Parameter]:
        """Parameters of a student's projectors."""
        prefixes = {_key(member, name) for name in self.terms}
        for key, projector in self.projectors.items():
            if key.rpartition("-")[0] in prefixes:
                yield from projector.parameters()

    def weights(self, progress: Progress) -> dict[str, float]:
        """Weight of each term now, see :meth:`Term.weight_at`."""
        return {name: term.weight_at(progress) for name, term in self.terms.items()}

    def needs_teacher(self, weights: Mapping[str, float]) -> bool:
        """Whether a term with a weight above 0 needs the teacher."""
        losses = (self.terms[name].loss for name, weight in weights.items() if weight)
        return any(isinstance(loss, FeatureLoss) or (loss is not None and loss.needs_teacher) for loss in losses)

    def needs_logits(self, weights: Mapping[str, float]) -> bool:
        """Whether a term with a weight above 0 needs the teacher's logits, not just its features."""
        terms = [self.terms[name] for name, weight in weights.items() if weight]
        return any(isinstance(t.loss, LogitLoss) and t.loss.needs_teacher and not t.on_layers for t in terms)

    def student_layers(self, member: str = "", weights: Mapping[str, float] | None = None) -> list[str]:
        """Layers of a student to capture: for the terms with a weight above 0, or for all terms if None."""
        return self._layers(lambda term: _layers_of(term.student, member), weights)

    def teacher_layers(self, weights: Mapping[str, float] | None = None) -> list[str]:
        """Layers of the teacher to capture, see :meth:`student_layers`."""
        return self._layers(_teacher_layers, weights)

    def prepare(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], member: str = "") -> None:
        """Make the projectors of a student from example features of the student and of the teacher.

        Raises:
            ValueError: If a term matches unequal numbers of features, or their shapes cannot be compared.
        """
        for name, term in self.terms.items():
            if not (isinstance(term.loss, FeatureLoss) and term.loss.projects):
                continue
            for index, (fs, ft) in enumerate(self._pairs(name, member, student, teacher)):
                self.projectors[_key(member, name, str(index))] = make_projector(fs, ft).to(fs.device)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        weights: Mapping[str, float],
        task_loss: Callable[[Tensor], Tensor],
        valid: Tensor | None = None,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
        member: str = "",
    ) -> dict[str, Tensor]:
        """Every term with a weight above 0, and their weighted sum as ``"loss"``.

        Args:
            student: Outputs, in scored form, and features of the student, with their graph.
            teacher: Those of the teacher.
            weights: From :meth:`weights`.
            task_loss: Outputs -> the task's own loss.
            valid: Valid positions: bool, of the outputs' shape without the classes or the embedding, of labels and
                numbers, which count each by itself, of the whole shape; or of its leading axes. All if None.
            labels: Hard labels at these positions, for terms that need them.
            tokens: Bool [B, L], True at tokens that are not padding, also those of a prompt; masks features that have
                one position a token.
            member: Name of the student in a family.

        Raises:
            ValueError: If a term compares outputs before :meth:`resolve` was called, or an output that it needs is
                missing.
        """
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        idle: list[str] = []
        assert student.logits is not None
        for name, term in self.terms.items():
            weight = weights[name]
            if term.loss is None:
                value = task_loss(student.logits if weight else student.logits.detach())
            elif not weight:
                idle += [name] if term.weight else []
                continue
            elif term.on_layers or isinstance(term.loss, FeatureLoss):
                value = self._feature_loss(name, student, teacher, (tokens, valid), member)
            elif teacher.sample is not None and term.loss.needs_teacher:
                if self.outputs is not None and self.outputs.class_dim != -1:
                    raise ValueError(
                        f"the cache holds a sample of the last axis, and the classes are along axis "
                        f"{self.outputs.class_dim}: cache with store: full"
                    )
                value = _sampled_loss(term.loss, student.logits, teacher.sample, valid)
            else:
                if teacher.logits is None and term.loss.needs_teacher:
                    raise ValueError(f"term {name!r} compares logits, and the teacher gave none: cache them as well")
                # A loss that needs no teacher still takes a tensor in its place.
                logits = student.logits if teacher.logits is None else teacher.logits
                value = self._output_loss(term.loss, student.logits, logits, valid, labels)
            values[name] = value
            if weight:
                # A weight of 1 leaves the value as it is, bit for bit; and 0 * NaN is NaN.
                part = value if weight == 1 else weight * value
                total = part if total is None else total + part
        if total is None or idle:
            # Before its warmup or after its decay a term adds nothing, but data-parallel training needs a gradient for
            # every parameter in every step.
            zero = self._zero(student.logits, idle, member)
            total = zero if total is None else total + zero
        return {"loss": total, **values}

    def _zero(self, logits: Tensor, idle: Sequence[str], member: str) -> Tensor:
        """Zero, with a graph to the student's output and to the projectors of these terms."""
        total = zero_of(logits)
        for name in idle:
            for key, projector in self.projectors.items():
                if key.rpartition("-")[0] == _key(member, name):
                    total = sum((0.0 * parameter.sum() for parameter in projector.parameters()), total)
        return total

    def _output_loss(
        self, loss: LogitLoss, student: Tensor, teacher: Tensor, valid: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        if self.outputs is None:
            raise ValueError(f"{loss} compares outputs, and it is not said what they are: call resolve first")
        return _scored_loss(loss, self.outputs, student, teacher, valid, labels)

    def _feature_loss(
        self,
        name: str,
        student: Outputs,
        teacher: Outputs,
        masks: tuple[Tensor | None, Tensor | None],
        member: str,
    ) -> Tensor:
        """The mean over the term's pairs of features; ``masks`` are those of the tokens and of the valid positions."""
        term, values = self.terms[name], []
        loss = term.loss
        assert loss is not None
        for index, (fs, ft) in enumerate(self._pairs(name, member, student.features, teacher.features)):
            if isinstance(loss, LogitLoss):
                outputs = term.output_type
                zs, zt = outputs.scored(fs), outputs.scored(ft)
                values.append(_scored_loss(loss, outputs, zs, zt, _matching_mask(zs, masks)))
                continue
            key = _key(member, name, str(index))
            if loss.projects:
                if key not in self.projectors:
                    raise ValueError(
                        f"term {name!r} has no projector yet: call prepare first, before the optimizer is made"
                    )
                fs = self.projectors[key](fs)
            # In the wider type: half precision would turn a teacher's 7e4 into infinity.
            wide = torch.promote_types(fs.dtype, ft.dtype)
            values.append(loss(fs.to(wide), ft.to(wide), _matching_mask(fs, masks)))
        return torch.stack(values).mean()

    def _pairs(
        self, name: str, member: str, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Features of one term, the student's beside the teacher's, in the order of the term's layers."""
        term = self.terms[name]
        of_student = _matching_names(_layers_of(term.student, member), student)
        of_teacher = _matching_names(_teacher_layers(term), teacher)
        if len(of_student) != len(of_teacher) or not of_student:
            raise ValueError(
                f"term {name!r} compares {len(of_student)} features of the student ({', '.join(of_student) or 'none'}) "
                f"with {len(of_teacher)} of the teacher ({', '.join(of_teacher) or 'none'}): name as many of each, in "
                "order"
            )
        if isinstance(term.loss, AttentionRelation):
            for path in (*of_student, *of_teacher):
                check_relation(path)  # a pattern may stand for a fused layer
        return [(student[one], teacher[other]) for one, other in zip(of_student, of_teacher)]

    def _layers(self, layers_of: Callable[[Term], list[str]], weights: Mapping[str, float] | None) -> list[str]:
        terms = (term for name, term in self.terms.items() if weights is None or weights[name])
        return list(dict.fromkeys(layer for term in terms if term.on_layers for layer in layers_of(term)))


def zero_of(logits: Tensor) -> Tensor:
    """Zero, with a graph to the logits."""
    # Not 0 times their sum: 0 times infinity is NaN.
    return 0.0 * logits.masked_fill(~logits.isfinite(), 0).sum()


def _layers_of(layers: Layers | dict[str, Layers] | None, member: str) -> list[str]:
    if isinstance(layers, dict):
        return _layers_of(layers[member], member)
    return [layers] if isinstance(layers, str) else list(layers or ())


def _teacher_layers(term: Term) -> list[str]:
    if term.teacher is None and isinstance(term.student, dict):
        raise ValueError("a term names features of the student: name the teacher's too, teacher: layers.3")
    return _layers_of(term.student if term.teacher is None else term.teacher, "")


def _matching_names(patterns: Iterable[str], features: Mapping[str, Tensor]) -> list[str]:
    """Names of features that match, in the order of the patterns, then of the modules."""
    return list(dict.fromkeys(name for pattern in patterns for name in features if matches(name, pattern)))


def _matching_mask(feature: Tensor, masks: Iterable[Tensor | None]) -> Tensor | None:
    """The first mask whose shape is that of the feature's leading axes."""
    for mask in masks:
        if mask is not None and feature.ndim > mask.ndim and feature.shape[: mask.ndim] == mask.shape:
            return mask
    return None


def _scored_loss(
    loss: LogitLoss,
    outputs: OutputType,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """A loss of outputs in scored form; ``valid`` may be of the leading axes of what counts by itself."""
    if outputs.kind == "classes":
        check_classes(student)
    shape = student.shape if outputs.elementwise else student.shape[:-1]
    if valid is not None and valid.shape != shape and valid.shape == shape[: valid.ndim]:
        valid = valid.reshape(*valid.shape, *[1] * (len(shape) - valid.ndim)).expand(shape)
    if outputs.elementwise and teacher.shape != student.shape and _without_ones(teacher) == _without_ones(student):
        teacher = teacher.reshape(student.shape)  # [B, 1] beside [B]
    if outputs.elementwise and "classes" in loss.kinds:
        # To a loss over the last axis each is a vector of its own.
        student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
    return loss(student, teacher, valid, labels)


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _losses_of(terms: Mapping[str, Term]) -> nn.ModuleDict:
    return nn.ModuleDict({name: term.loss for name, term in terms.items() if term.loss is not None})


def _sampled_loss(
    loss: LogitLoss, logits: Tensor, sample: tuple[Tensor, Tensor, Tensor], valid: Tensor | None
) -> Tensor:
    # The ids were drawn from the teacher's probabilities at temperature 1: they estimate no other distribution.
    if not isinstance(loss, SoftTarget) or loss.temperature != 1 or loss.standardize or loss.class_weights:
        raise ValueError(
            f"{loss} needs all of the teacher's logits, and the cache holds a sample of them: use SoftTarget at "
            "temperature 1, or cache with store: full"
        )
    return sampled_soft_target(logits, *sample, valid=valid)


def _without_projectors(objective: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Ignore the projectors of a checkpoint where there are none yet: the student does not need them."""
    if not objective.projectors:
        for key in [key for key in state if key.startswith(f"{prefix}projectors.")]:
            del state[key]


def _key(*parts: str) -> str:
    return "-".join(part for part in parts if part)


def make_projectors(objective: Objective, student: Outputs, teacher: Outputs) -> None:
    """Make the projectors, equal on all ranks. Every rank calls this; the random state stays as it is."""
    with same_random_state(), torch.no_grad():
        objective.prepare(student.features, teacher.features)
    objective.projectors.requires_grad_(True).train()
    if world_size() > 1:
        for value in objective.projectors.state_dict().values():
            torch.distributed.broadcast(value, 0)


def average_gradients(objective: Objective) -> None:
    """Average the projectors' gradients over all ranks. Every rank calls this after its last backward pass."""
    if (ranks := world_size()) == 1:
        return
    for parameter in objective.projectors.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(ranks)
