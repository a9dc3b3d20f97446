"""DistillModule: a student, or a family of students, and their teacher as a LightningModule; the ``distill`` job."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from distill.cache import CachedBatch, CachedTeacher, open_teacher
from distill.features import capture
from distill.language import FactoredLogits, check_headless, chunked_terms, headless
from distill.losses import SoftTarget
from distill.objective import Losses, Objective, Outputs, SoftTargets, Term
from distill.targets import TeacherLike, as_teacher, task_targets, training_progress
from distill.teacher import Teacher, eval_mode
from workbench.duration import Duration
from workbench.models.positions import tokens_of
from workbench.randomness import random_state, same_random_state, set_random_state
from workbench.records.source import Source
from workbench.tasks import Imitation, LanguageModelling, LogitsSpec, Task, loss_weight, scored
from workbench.training.fit import check_namespace, task_for, trains
from workbench.training.loop import train_and_save
from workbench.training.module import LRSchedulerCallable, OptimizerCallable, StepOutput, SupervisedModule, metric_name


@final
class DistillModule(SupervisedModule):
    """A student trained on its teacher's outputs and on hard labels; or a family of students, each as if alone.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * task loss, or the weighted sum of the terms in ``losses``

    What is compared is what the task's outputs are, :class:`~distill.SoftTargets`: distributions over classes
    or of independent labels, or a regression's numbers.

    The teacher is frozen, in eval mode and outside the module tree: not in ``parameters()``, the optimizer, DDP or
    any checkpoint. It runs once a batch for all students, and not at all where no term with a weight above 0 needs it.
    Logged: ``train/loss`` and every term by name, for a family under ``train/STUDENT/``; the task's own loss also at
    weight 0.

    The students of a family share the optimizer, the batches and the teacher's outputs, and nothing else: gradients are
    clipped per student, and dropout draws from one random stream per student. With an optimizer that treats parameters
    one by one, as SGD and Adam do, each student ends as if trained alone. The exception are data loaders that draw from
    torch's global generator, which those of recipes do not: dropout then differs.

    A loss on features is a mean over the tokens, or samples, of a micro-batch. Micro-batches are then weighted by their
    valid positions, so with padding it is not quite the mean over all tokens of an update. With class weights of the
    task they are weighted by the sum of these, the teacher's part too, which then depends on how an update is split.

    Args:
        student: The network to train, afterwards ``network``; or several by name.
        teacher: A Teacher, a trained network, or where to load a teacher or a cache of its outputs from.
        task: Loss on hard labels, and metrics.
        losses: The objective: :class:`~distill.SoftTargets`, or terms by name. By default SoftTargets(), for
            an Imitation task its own loss.
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.
        chunked: For language models of transformers with large vocabularies: compute soft and hard loss from hidden
            states a chunk of tokens at a time, so that training never holds logits of [tokens, vocabulary].

    Raises:
        ValueError: If an argument is out of range; in training, if the teacher has other classes than the student, or
            an output that a term compares is missing.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        student: nn.Module | Mapping[str, nn.Module],
        teacher: TeacherLike,
        task: Task,
        losses: Losses | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        chunked: bool = False,
        logits: LogitsSpec | None = None,
        teacher_logits: LogitsSpec | None = None,
    ) -> None:
        imitation = isinstance(task, Imitation)
        if imitation and isinstance(losses, SoftTargets):
            raise ValueError(
                f"temperature is {losses.temperature} and alpha {losses.alpha}, but {type(task).__name__} has no "
                "labels beside the teacher: leave them out, or give losses"
            )
        super().__init__(student, task, optimizer, lr_scheduler, self._teacher_output if imitation else None, logits)
        if losses is None:
            losses = {"imitation": Term()} if imitation else SoftTargets()
        self.teacher = as_teacher(teacher, teacher_logits)
        self.objective = Objective(losses, tuple(self.members), task.outputs)
        if isinstance(self.teacher, Teacher):
            self.teacher.check_outputs(task.outputs)
        self.chunked = chunked
        if imitation and isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                f"{type(task).__name__} has no labels, so validation runs the teacher, which a cache cannot do: give a "
                "live teacher"
            )
        if chunked:
            _check_chunked(self.objective.terms, task, self.teacher)
            if logits is not None or teacher_logits is not None:
                raise ValueError("chunked computes logits itself, by the output layer: leave logits and chunked apart")
        self._heads_checked = False
        if self.family:
            self.configure_gradient_clipping = self._clip_each

    def attach(self, loader: Any) -> Any:
        """The training loader with the cached targets of each batch; the same loader if the teacher is live."""
        return self.teacher.attach(loader) if isinstance(self.teacher, CachedTeacher) else loader

    def setup(self, stage: str) -> None:
        """Make the projectors from the first batch, before the optimizer is made.

        An iterable that can be read only once loses that batch: call :meth:`prepare` with a batch before ``fit``.
        """
        if stage != "fit":
            return
        self.random_states.states = {}
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

        ``fit`` calls it; call it yourself, before the optimizer is made, in your own loop. The students stay as
        they are, and torch's random state changes only by the projectors' initial weights.
        """
        batch, cached = _split_batch(batch)
        args, kwargs = self.task.inputs(batch)
        targets = self._targets(batch, args, kwargs, cached, None)
        # Each member starts from the same random state, so that its projectors are those it would have alone.
        state = random_state()
        for member, student in self.members.items():
            set_random_state(state)
            with eval_mode(student):
                outputs = self._outputs(student, batch, args, kwargs, self.objective.student_layers(member))
            self.objective.prepare(outputs.features, targets.features, member)

    def step(self, batch: Any) -> StepOutput:
        """One forward pass of the teacher, one of each student, and the terms of each student's objective."""
        batch, cached = _split_batch(batch)
        weights = self.objective.weights(functools.partial(training_progress, self._trainer))
        args, kwargs = self.task.inputs(batch)
        targets = Outputs(None)
        teacher_logits: FactoredLogits | None = None
        if self.chunked:
            teacher_logits = self._factored_teacher(args, kwargs) if weights["soft"] else None
        elif self.target is not None or self.objective.needs_teacher(weights):
            targets = self._targets(batch, args, kwargs, cached, weights)
        if isinstance(self.task, Imitation):
            assert targets.logits is not None
            batch = self.task.with_target(batch, targets.logits)
        valid, logged, total = self.task.valid(batch), {}, None
        for member, student in self.members.items():
            stream: AbstractContextManager[None] = nullcontext()
            if self.family:
                stream = self.random_states.fork(member, valid.device)
            with stream:
                if self.chunked:
                    student_logits = self._factored(student, student, args, kwargs)
                    terms = self._chunked_terms(student_logits, teacher_logits, batch, weights)
                else:
                    outputs = self._outputs(
                        student, batch, args, kwargs, self.objective.student_layers(member, weights)
                    )
                    terms = self.objective(
                        outputs,
                        targets,
                        weights,
                        task_loss=lambda logits: self.task.loss(logits, batch),
                        valid=valid,
                        labels=self.task.targets(batch),
                        tokens=tokens_of(batch),
                        member=member,
                    )
            logged |= {metric_name(member, name): value for name, value in terms.items()}
            total = terms["loss"] if total is None else total + terms["loss"]
        assert total is not None
        return StepOutput(total, logged, loss_weight(self.task, batch))

    def _targets(
        self,
        batch: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cached: Mapping[str, Tensor] | None,
        weights: Mapping[str, float] | None,
    ) -> Outputs:
        """The teacher's outputs at the scored positions; without ``weights`` its features only."""
        layers = self.objective.teacher_layers(weights)
        logits = weights is not None and (self.target is not None or self.objective.needs_logits(weights))
        return task_targets(self.teacher, self.task, batch, args, kwargs, cached, layers, logits)

    def _outputs(
        self, student: nn.Module, batch: Any, args: Sequence[Any], kwargs: Mapping[str, Any], layers: Sequence[str]
    ) -> Outputs:
        if not layers:
            return Outputs(scored(self.task, student(*args, **kwargs), batch, self.logits))
        with capture(student, layers) as features:
            logits = scored(self.task, student(*args, **kwargs), batch, self.logits)
            return Outputs(logits, features.take())

    def _teacher_output(self, *args: Any, **kwargs: Any) -> Tensor:
        """The targets of an Imitation task in validation."""
        assert isinstance(self.teacher, Teacher)
        return self.task.output(self.teacher.select(self.teacher(*args, **kwargs)))

    def _clip_each(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each student and its projectors separately."""
        if not gradient_clip_val:
            return
        for member, student in self.members.items():
            parameters = [*student.parameters(), *self.objective.parameters_of(member)]
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def _chunked_terms(
        self, student: FactoredLogits, teacher: FactoredLogits | None, batch: Any, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Soft and hard loss from hidden states; without a teacher, whose weight is then 0, the hard loss alone."""
        soft: Any = self.objective.terms["soft"].loss
        total, soft_value, hard_value = chunked_terms(
            student,
            student if teacher is None else teacher,
            (weights["soft"], weights.get("hard", 0.0)),
            temperature=soft.temperature,
            labels=self.task.targets(batch) if "hard" in weights else None,
            valid=self.task.valid(batch),
        )
        values = {"loss": total}
        if weights["soft"]:
            values["soft"] = soft_value
        if "hard" in weights:
            values["hard"] = hard_value
        return values

    def _factored_teacher(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FactoredLogits:
        assert isinstance(self.teacher, Teacher)
        if not self._heads_checked:
            for model in (self.teacher.module, *self.members.values()):
                check_headless(model, args, kwargs)
            self._heads_checked = True
        return self._factored(self.teacher.module, self.teacher, args, kwargs)

    def _factored(
        self, model: nn.Module, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> FactoredLogits:
        """Hidden states of ``model`` at the scored positions, from ``call``, and its head over the vocabulary."""
        assert isinstance(self.task, LanguageModelling)
        head: Any
        with headless(model) as head:
            hidden = self.task.aligned(call(*args, **kwargs))
        size = self.task.vocabulary
        bias = None if head.bias is None else _first_rows(head.bias, size)
        return FactoredLogits(hidden, _first_rows(head.weight, size), bias)


def _check_chunked(terms: Mapping[str, Term], task: Task, teacher: Any) -> None:
    """Raises: ValueError: unless the objective can be computed from hidden states."""
    if not isinstance(task, LanguageModelling):
        raise ValueError(f"chunked is for language models, and the task is {type(task).__name__}: leave it out")
    soft = terms["soft"].loss if "soft" in terms else None
    hard = terms["hard"].loss if "hard" in terms else None
    plain = isinstance(soft, SoftTarget) and not (soft.standardize or soft.class_weights or terms["soft"].on_layers)
    if set(terms) - {"soft", "hard"} or not plain or hard is not None:
        losses = ", ".join(f"{name}: {term.loss or 'own'}" for name, term in terms.items())
        raise ValueError(f"chunked computes soft, a plain SoftTarget, and hard, the task's own loss, and not {losses}")
    if task.label_smoothing:
        raise ValueError(f"chunked smooths no labels, and label_smoothing is {task.label_smoothing}: leave one out")
    if not isinstance(teacher, Teacher) or isinstance(teacher.module, nn.ModuleList):
        raise ValueError("chunked needs hidden states of one live teacher: leave chunked out with a cache or several")


def _first_rows(rows: Tensor, count: int) -> Tensor:
    """The first rows; a slice of all of them would copy them in backward."""
    return rows if len(rows) == count else rows[:count]


def _split_batch(batch: Any) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The batch as the task reads it, and its cached targets."""
    return (batch.batch, batch.cached_targets) if isinstance(batch, CachedBatch) else (batch, None)


def module_for(
    model: nn.Module | dict[str, nn.Module],
    teacher: list[Source] | Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float | None = None,
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
    soft = SoftTargets(temperature, alpha)
    objective: Losses | None = losses
    if soft != SoftTargets():
        if losses is not None:
            raise ValueError("temperature and alpha are given beside losses: set them there, in the terms")
        objective = soft
    source: Any = teacher
    return DistillModule(
        model,
        open_teacher(source, precision=precision, weights=teacher_weights),
        task_for(data, task),
        objective,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        chunked=chunked,
    )


@trains(module_for)
def distill(
    model: nn.Module | dict[str, nn.Module],
    teacher: list[Source] | Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float | None = None,
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
        temperature: Softens both outputs, 4 by default; the loss is scaled by its square. Regressions have none.
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
        model=model,
        teacher=teacher,
        data=data,
        task=task,
        temperature=temperature,
        alpha=alpha,
        losses=losses,
        chunked=chunked,
        precision=precision,
        teacher_weights=teacher_weights,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    return train_and_save(module, data, out, trainer=trainer, seed=seed_everything, checkpoint=checkpoint)
