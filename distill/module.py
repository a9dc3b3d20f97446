"""DistillModule: one student or a family of them and their teacher as a LightningModule, and the ``distill`` job."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from distill.cache import CachedBatch, CachedTeacher, open_teacher
from distill.features import capture
from distill.language import check_headless, chunked_terms, headless
from distill.losses import SoftTarget
from distill.objective import Outputs, Term, check_scored, objective_of
from distill.targets import TeacherLike, as_teacher, elapsed, targets_of
from distill.teacher import Teacher, eval_mode
from workbench.duration import Duration
from workbench.models.positions import tokens_of
from workbench.randomness import random_state, same_random_state, set_random_state
from workbench.records.source import Source
from workbench.tasks import Imitation, LanguageModelling, Task
from workbench.training.fit import check_namespace, task_for, trains
from workbench.training.loop import train_and_save
from workbench.training.module import LRSchedulerCallable, OptimizerCallable, Step, SupervisedModule, named


@final
class DistillModule(SupervisedModule):
    """A student trained on its teacher's outputs and on the labels; or a family of students, each as if alone.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * task loss, or the weighted sum of ``losses``

    The teacher is frozen, in eval mode and outside the module tree: not in ``parameters()``, the optimizer, DDP or
    any checkpoint; it is asked once a batch, however many students there are. Where no term of some weight needs it,
    it is not asked at all. Logged: ``train/loss`` and every term by name, of a family under ``train/STUDENT/``. The
    task's own loss is logged at weight 0 too.

    Students of a family share the optimizer, the batches and the teacher's answers, and nothing else: gradients are
    clipped for each of them, dropout has a stream of random numbers for each. With an optimizer that treats parameters
    one by one, as SGD and Adam do, each comes out as if trained alone; where data loaders draw from torch's global
    generator, which those of recipes do not, its dropout is another.

    A loss on features is a mean over the tokens, or samples, of a micro-batch; micro-batches are then weighed by the
    positions that the task scores, so with padding it is not quite the mean over all of an update's tokens.

    Args:
        student: The network to train, ``network`` from then on; or several by name.
        teacher: A Teacher, a trained network, or where to load one or a cache of its outputs from.
        task: Loss on labels, and metrics.
        temperature: T > 0.
        alpha: Weight of the soft targets, 0 (labels only) to 1 (teacher only).
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.
        losses: The terms of the objective by name, instead of ``temperature`` and ``alpha``.
        chunked: For language models of transformers with large vocabularies: compute soft and hard loss from hidden
            states a chunk of tokens at a time, so that logits of [tokens, vocabulary] are never held in training.

    Raises:
        ValueError: If an argument is out of range; in training, if the teacher's classes are not the student's, or
            what a term compares is not there.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        student: nn.Module | Mapping[str, nn.Module],
        teacher: TeacherLike,
        task: Task,
        temperature: float = 4.0,
        alpha: float = 0.9,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        losses: Mapping[str, Term] | None = None,
        chunked: bool = False,
    ) -> None:
        imitates = isinstance(task, Imitation)
        if imitates and losses is None:
            if (temperature, alpha) != (4.0, 0.9):
                raise ValueError(
                    f"temperature is {temperature} and alpha {alpha}, but {type(task).__name__} has neither classes "
                    "nor labels: leave them away, or give losses"
                )
            losses = {"imitation": Term()}
        super().__init__(student, task, optimizer, lr_scheduler, self._teacher_outputs if imitates else None)
        self.teacher = as_teacher(teacher)
        self.objective = objective_of(temperature, alpha, losses, tuple(self.members))
        check_scored(self.objective, task)
        self.chunked = chunked
        if imitates and isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                f"{type(task).__name__} has no labels, so validation asks the teacher, which a cache cannot be: "
                "give it live"
            )
        if chunked:
            _check_chunked(self.objective.terms, task, self.teacher)
        self._heads_known = False
        if self.family:
            self.configure_gradient_clipping = self._clip_each

    def attach(self, loader: Any) -> Any:
        """The training loader, its batches with the cached teacher's outputs; as it is if the teacher is live."""
        return self.teacher.attach(loader) if isinstance(self.teacher, CachedTeacher) else loader

    def setup(self, stage: str) -> None:
        """Look at a batch, where the objective has projectors to make, before the optimizer is made.

        Data that can be read only once lose it: call :meth:`prepare` before, with a batch of your own.
        """
        if stage != "fit":
            return
        self.streams.states = {}
        if self.objective.projects and not self.objective.projectors:
            loader = self.trainer.fit_loop._data_source.dataloader()
            if isinstance(loader, Mapping | list | tuple):
                raise ValueError(
                    "there are several training loaders, and projectors are made for one batch: call prepare(batch) on "
                    "the module before fit"
                )
            with same_random_state():
                self.prepare(self._apply_batch_transfer_handler(next(iter(loader)), self.device, 0))

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """Make the projectors between features of unequal widths, for batches like this one.

        ``fit`` calls it; in a loop of your own, call it before the optimizer is made. The students and the random state
        of torch stay as they are but for what drawing the projectors takes.
        """
        batch, cached = _split_batch(batch)
        args, kwargs = self.task.inputs(batch)
        targets = self._targets(args, kwargs, cached, None)
        state = random_state()
        for member, student in self.members.items():
            set_random_state(state)
            with eval_mode(student):
                seen = self._student_outputs(student, args, kwargs, self.objective.student_layers(member))
            self.objective.prepare(seen.features, targets.features, member)

    def step(self, batch: Any) -> Step:
        """One look at the teacher, one forward pass of each student, and the terms of its objective."""
        batch, cached = _split_batch(batch)
        weights = self.objective.weights(functools.partial(elapsed, self._trainer))
        args, kwargs = self.task.inputs(batch)
        targets = Outputs(None)
        known: _Hidden | None = None
        if self.chunked:
            known = self._teacher_hidden(args, kwargs) if weights["soft"] else None
        elif self.target is not None or self.objective.needs_teacher(weights):
            targets = self._targets(args, kwargs, cached, weights)
        if isinstance(self.task, Imitation):
            assert targets.logits is not None
            batch = self.task.with_target(batch, targets.logits)
        valid, logged, total = self.task.valid(batch), {}, None
        for member, student in self.members.items():
            stream: AbstractContextManager[None] = nullcontext()
            if self.family:
                stream = self.streams.of(member, valid.device)
            with stream:
                if self.chunked:
                    terms = self._chunked_terms(student, args, kwargs, batch, weights, known)
                else:
                    seen = self._student_outputs(student, args, kwargs, self.objective.student_layers(member, weights))
                    terms = self.objective(
                        seen,
                        targets,
                        weights,
                        own=lambda logits: self.task.loss(logits, batch),
                        valid=valid,
                        labels=self.task.targets(batch),
                        tokens=tokens_of(batch),
                        member=member,
                    )
            logged |= {named(member, name): value for name, value in terms.items()}
            total = terms["loss"] if total is None else total + terms["loss"]
        assert total is not None
        return Step(total, logged, valid.sum())

    def _targets(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], cached: Mapping[str, Tensor] | None, weights: Any
    ) -> Outputs:
        """What the teacher says of a batch, where the task scores it; without ``weights`` features only."""
        asks = weights is not None and (self.target is not None or self.objective.needs_logits(weights))
        layers, task = self.objective.teacher_layers(weights), self.task
        if not isinstance(task, LanguageModelling):
            return targets_of(self.teacher, args, kwargs, cached, layers, asks, task.output)
        targets = targets_of(self.teacher, args, kwargs, cached, layers, asks, task.aligned)
        return targets if targets.logits is None else targets._replace(logits=targets.logits[..., : task.vocabulary])

    def _student_outputs(
        self, student: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: Sequence[str]
    ) -> Outputs:
        if not layers:
            return Outputs(self.task.output(student(*args, **kwargs)))
        with capture(student, layers) as features:
            logits = self.task.output(student(*args, **kwargs))
            return Outputs(logits, features.take())

    def _teacher_outputs(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the students are to say in validation."""
        assert isinstance(self.teacher, Teacher)
        return self.task.output(self.teacher(*args, **kwargs))

    def _clip_each(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each student, and of its projectors, as if it were alone."""
        if not gradient_clip_val:
            return
        for member, student in self.members.items():
            mine = [*student.parameters(), *self.objective.parameters_of(member)]
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(mine, gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(mine, gradient_clip_val)

    def _chunked_terms(
        self,
        student: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batch: Any,
        weights: Mapping[str, float],
        known: "_Hidden | None",
    ) -> dict[str, Tensor]:
        """Soft and hard loss from hidden states; ``known`` are the teacher's, if they are needed."""
        soft: Any = self.objective.terms["soft"].loss
        mine = self._hidden(student, student, args, kwargs)
        theirs = mine if known is None else known  # not looked at where soft targets have no weight
        total, *terms = chunked_terms(
            mine.states,
            mine.weight,
            theirs.states,
            theirs.weight,
            soft.temperature,
            self.task.targets(batch),
            (weights["soft"], weights.get("hard", 0.0)),
            self.task.valid(batch),
            mine.bias,
            theirs.bias,
        )
        return {"loss": total, **dict(zip(("soft", "hard"), terms))}

    def _teacher_hidden(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "_Hidden":
        """The teacher's hidden states and head."""
        assert isinstance(self.teacher, Teacher)
        if not self._heads_known:
            for model in (self.teacher.module, *self.members.values()):
                check_headless(model, args, kwargs)
            self._heads_known = True
        return self._hidden(self.teacher.module, self.teacher, args, kwargs)

    def _hidden(
        self, model: nn.Module, ask: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> "_Hidden":
        """Hidden states of a model at the positions that are scored, and its head over the vocabulary."""
        assert isinstance(self.task, LanguageModelling)
        head: Any
        with headless(model) as head:
            states = self.task.aligned(ask(*args, **kwargs))
        size = self.task.vocabulary
        return _Hidden(states, _first(head.weight, size), None if head.bias is None else _first(head.bias, size))


class _Hidden(NamedTuple):
    """Hidden states [..., D], and the head that makes logits of them, [V, D] and [V]."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def _check_chunked(terms: Mapping[str, Term], task: Task, teacher: Any) -> None:
    """Raises: ValueError: unless the objective can be computed from hidden states."""
    if not isinstance(task, LanguageModelling):
        raise ValueError(f"chunked is for language models, and the task is {type(task).__name__}: leave it away")
    soft = terms["soft"].loss if "soft" in terms else None
    own = terms["hard"].loss if "hard" in terms else None
    if set(terms) - {"soft", "hard"} or not isinstance(soft, SoftTarget) or soft.standardize or own is not None:
        said = ", ".join(f"{name}: {term.loss or 'own'}" for name, term in terms.items())
        raise ValueError(f"chunked computes soft, a plain SoftTarget, and hard, the task's own loss, and not {said}")
    if task.label_smoothing:
        raise ValueError(f"chunked smooths no labels, and label_smoothing is {task.label_smoothing}: leave one away")
    if not isinstance(teacher, Teacher) or isinstance(teacher.module, nn.ModuleList):
        raise ValueError("chunked needs hidden states of one live teacher: leave chunked away with a cache or several")


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows; a slice of all of them would copy them in backward."""
    return rows if len(rows) == count else rows[:count]


def _split_batch(batch: Any) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The batch that the task knows, and what a cache added to it."""
    return (batch.batch, batch.cached_targets) if isinstance(batch, CachedBatch) else (batch, None)


def module_for(
    model: nn.Module | dict[str, nn.Module],
    teacher: list[Source] | Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    losses: dict[str, Term] | None = None,
    chunked: bool = False,
    precision: Literal["bf16", "int8"] | None = None,
    teacher_weights: list[float] | None = None,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
) -> DistillModule:
    """The module that :func:`distill` trains."""
    students = model if isinstance(model, dict) else {"": model}
    for student in students.values():
        check_namespace(student)
        if isinstance(student, LightningModule):
            raise ValueError(
                f"the student {type(student).__name__} is a LightningModule, whose own training_step and optimizer "
                "would not be used here: give its network, or fit it with distill.DistillationCallback in "
                "trainer.callbacks"
            )
    source: Any = teacher
    cached = open_teacher(source, precision=precision, weights=teacher_weights)
    return DistillModule(
        model, cached, task_for(data, task), temperature, alpha, optimizer, lr_scheduler, losses, chunked
    )


@trains(module_for)
def distill(
    model: nn.Module | dict[str, nn.Module],
    teacher: list[Source] | Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    losses: dict[str, Term] | None = None,
    chunked: bool = False,
    precision: Literal["bf16", "int8"] | None = None,
    teacher_weights: list[float] | None = None,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: dict[str, Any] | None = None,
    seed_everything: int = 0,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    out: Path = Path("runs/distill"),
) -> dict[str, Any]:
    """Train a student, or a family of them, on its teacher's softened outputs and on the labels (Hinton et al. 2015).

    Args:
        model: The student network; or several by name, trained side by side, each as if alone.
        teacher: A stage that trained one or cached its outputs, or a folder or hub name to load one from; or several
            that train, whose logits are averaged.
        data: The data module.
        task: Loss and metrics; by default the data module's own `task`, else classification over its `classes`.
        temperature: Softens both outputs; the loss is scaled by its square.
        alpha: Weight of the soft targets, 0 (labels only) to 1 (teacher only).
        losses: Terms of the objective by name, instead of temperature and alpha.
        chunked: For language models: soft and hard loss without logits of [tokens, vocabulary].
        precision: What the teacher computes in: its own by default, or bf16, or int8 for its linear layers.
        teacher_weights: Of several teachers, equal by default.
        optimizer: AdamW at 1e-3 by default.
        lr_scheduler: Stepped once an epoch; constant by default.
        trainer: Arguments of Lightning's Trainer; `max_epochs` or `max_steps` is needed.
        seed_everything: Seed of the initial weights, the data order and everything random in training.
        checkpoint: How often the checkpoint that a stopped stage resumes from is written, e.g. 1ep or 500it.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, history and size, for the record; of a family by student.
    """
    module = module_for(
        model,
        teacher,
        data,
        task,
        temperature,
        alpha,
        losses,
        chunked,
        precision,
        teacher_weights,
        optimizer,
        lr_scheduler,
    )
    return train_and_save(module, data, trainer, seed_everything, out, checkpoint)
