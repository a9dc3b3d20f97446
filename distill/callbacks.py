"""Distillation for any LightningModule, in either Lightning namespace."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import Callback
from pytorch_lightning import Callback as PLCallback
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distill.cache import CachedBatch, CachedTeacher
from distill.features import Features, capture, is_compiled
from distill.objective import Losses, Objective, Outputs, SoftTargets, average_gradients, make_projectors
from distill.scored import Scores, aligned_labels, by_labels, by_task
from distill.targets import TeacherLike, as_teacher, decoder_inputs, targets_of, task_targets, training_progress
from distill.teacher import Teacher
from workbench.models.forward import LABELS
from workbench.models.positions import IGNORED, tokens_of
from workbench.models.wrappers import unwrap
from workbench.tasks import Kind, LogitsSpec, OutputType, loss_weight, select_logits
from workbench.tasks.outputs import infer, output_type
from workbench.training.means import GlobalMean, Means
from workbench.training.module import StepOutput, SupervisedModule


class _Call(NamedTuple):
    """One forward pass of the student, with gradient."""

    args: Any
    kwargs: Any
    output: Any
    features: dict[str, Tensor]


class _Batch(NamedTuple):
    """A training batch, and its cached targets if the teacher is a cache."""

    batch: Any
    cached_targets: Mapping[str, Tensor] | None


@final
class DistillationCallback(Callback, PLCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Trains the student of an unmodified LightningModule on a teacher beside its own loss.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * the loss of ``training_step``, or the weighted sum of the
    terms in ``losses``, where a term without a loss is that of ``training_step``

    The student's logits are those of its network in the step; the teacher gets the same inputs without ``labels``, and
    what else of a batch that is a mapping its ``forward`` names.
    What they are, of classes, independent labels or numbers, decides the loss, see :class:`~distill.SoftTargets`.
    For a :class:`workbench.TaskModule` the task says it, and where the labels count: training equals that of a
    :class:`~distill.DistillModule`. For any other module ``outputs`` says it, else ``config.problem_type`` of its
    network, else the labels of the first batch (:func:`workbench.tasks.outputs.infer`); where these leave a doubt,
    training stops before the first step and asks.
    ``training_step`` is wrapped during ``fit`` and restored afterwards. The teacher does not run where no term with a
    weight above 0 needs it. Logged per epoch: ``train/TERM``, the mean of each term, such as ``train/soft``. Every term
    is a mean over a micro-batch, as the module's own loss is. Lightning averages these over micro-batches and ranks,
    however many valid positions each has; a :class:`workbench.TaskModule` weights them by its valid positions.

    A cached teacher comes with the batches: ``trainer.fit(module, callback.attach(loader))``. ``training_step`` gets
    the plain batch; other hooks of the module that look at training batches get a ``distill.cache.CachedBatch``.

    Projectors between features of unequal widths are made at the first batch and stay outside of the module. Their
    optimizer has the class and defaults of the module's first optimizer and the learning rate of its first group, and
    steps right after it; gradient clipping leaves them out. They are saved in the Trainer's checkpoint as
    ``distillation_projectors``, not in the module's ``state_dict``.

    Order of events in a fit::

        setup                  projectors of an earlier fit are dropped, and what its outputs were
        on_load_checkpoint     state of the projectors is kept until they are made
        on_fit_start           training_step is wrapped; what torch.compile made of the module before is discarded
        on_train_start         a post-step hook on the module's first optimizer is registered
        training_step          student (with hooks), teacher, terms; at the first batch what the outputs are, projectors
                               and their optimizer
        on_before_optimizer_step, optimizer.step, post-step hook: projectors' gradients averaged, projectors stepped
        on_before_zero_grad    projectors' gradients cleared with the module's
        teardown, on_exception hooks removed, training_step restored

    Args:
        teacher: A Teacher, a trained network, or where to load one from; or a CachedTeacher, or where to find a cache.
        losses: The objective: :class:`~distill.SoftTargets`, or terms by name; SoftTargets() by default.
            Features of the student are named as in the submodule that makes the logits.
        student: Name of the submodule that makes the logits; ``network``, ``model`` or else the module itself if None.
        valid: Batch -> valid positions, a bool tensor of the logits' shape without the classes, of labels and numbers
            of the whole shape, e.g. ``lambda batch: batch["labels"] != -100`` for a masked language model. The last
            output of a causal one predicts nothing, and each other the next token:
            ``lambda batch: torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))``. If None, positions whose
            label is neither ``ignore_index`` nor NaN, after the shift of a causal transformers model, and that no
            ``attention_mask`` of the batch calls padding; all without labels. Not for a TaskModule.
        labels: Batch -> hard labels at these positions. If None, ``labels``, ``label``, ``label_ids``, ``targets``,
            ``target`` or ``y`` of a mapping, or the last entry of a tuple; for a causal transformers model shifted. Not
            for a TaskModule.
        outputs: What the outputs are: ``"classes"`` along the last axis, ``"labels"``, ``"numbers"`` or
            ``"embedding"``; for classes along axis 1, as in segmentation, ``OutputType("classes", class_dim=1)``.
        logits: Where the logits are in what the student returns: a key, an index or a function, see
            :func:`workbench.tasks.select_logits`; None for a tensor, or an output with ``logits``. A TaskModule has its
            own.
        teacher_logits: The same for the teacher.
        ignore_index: Label of positions that do not count; -100 if None. Not for a TaskModule.

    Raises:
        ValueError: If a term is out of range; when training starts, if the module has no such submodule or steps its
            optimizers manually, or a TaskModule's task says something else than the arguments; in training, before the
            first step, if it cannot be told what the outputs are, or a term compares others; in training, if the
            submodule was not called exactly once or did not return logits, the teacher has other classes, labels do not
            go with the outputs, or an output that a term compares is missing.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        teacher: TeacherLike,
        losses: Losses | None = None,
        student: str | None = None,
        valid: Callable[[Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        outputs: OutputType | Kind | None = None,
        logits: LogitsSpec | None = None,
        teacher_logits: LogitsSpec | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.losses = SoftTargets() if losses is None else losses
        self.outputs = None if outputs is None else output_type(outputs)
        self.objective = Objective(self.losses, outputs=outputs)
        self.teacher = as_teacher(teacher, teacher_logits)
        self.student, self.valid, self.labels = student, valid, labels
        self.logits, self.ignore_index = logits, ignore_index
        self._means = Means()
        self._global_mean = GlobalMean()
        self._wrapped: Any = None
        self._original_step: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: Any = None
        self._post_step: Any = None
        self._restored: dict[str, Any] = {}

    def attach(self, loader: Any) -> Any:
        """The training loader with the cached targets of each batch; the same loader if the teacher is live."""
        return self.teacher.attach(loader) if isinstance(self.teacher, CachedTeacher) else loader

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Drop what an earlier fit made: its projectors, and what its outputs were."""
        if stage == "fit":
            self.objective = Objective(self.losses, outputs=self.outputs)
            self._optimizer, self._scaler, self._restored = None, None, {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap ``training_step``, or the ``step`` of a SupervisedModule."""
        self._unwrap()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its optimizers by hand, so its loss cannot be changed from outside: "
                "add distill.losses.soft_target to the loss in its training_step"
            )
        self._student_of(pl_module)
        if isinstance(pl_module, SupervisedModule):
            self._check_task(pl_module)
        if is_compiled(pl_module):
            # Code that was compiled in an earlier fit takes no notice of the hooks: it is compiled again with them.
            torch.compiler.reset()
        name = _step_name(pl_module)
        original = getattr(pl_module, name)
        if isinstance(getattr(getattr(original, "func", None), "__self__", None), DistillationCallback):
            raise ValueError(f"{type(pl_module).__name__} has a DistillationCallback already: give the Trainer one")
        # A partial, unlike a closure, is copied along with a module that is copied in training.
        step = functools.update_wrapper(functools.partial(self._step, pl_module, original), original)
        # An instance attribute of that name, where there is one, is put back afterwards; else the class's shows again.
        self._wrapped, self._original_step = pl_module, vars(pl_module).get(name)
        setattr(pl_module, name, step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Step the projectors after each step of the module's first optimizer."""
        self._global_mean = GlobalMean()
        if self.objective.projects and trainer.optimizers:
            self._post_step = trainer.optimizers[0].register_step_post_hook(self._step_projectors)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore ``training_step``."""
        self._unwrap()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore ``training_step``."""
        self._unwrap()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the epoch's means."""
        self._means.reset()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch's means."""
        self._means.log(pl_module, "train/")
        self._means.reset()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clear the projectors' gradients when the module's first optimizer does."""
        if trainer.optimizers and optimizer is trainer.optimizers[0]:
            self.objective.projectors.zero_grad()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Average the projectors' gradients over ranks, and over micro-batches as the module's own.

        The projectors are not part of the module: neither DDP nor Lightning does this for them.
        """
        if trainer.optimizers and optimizer is trainer.optimizers[0]:
            average_gradients(self.objective)
            self._global_mean.scale_gradients(self.objective.projectors.parameters(), trainer)
            self._scaler = getattr(trainer.precision_plugin, "scaler", None)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the epoch's sums so far, and the projectors with their optimizer."""
        checkpoint["distillation_means"] = self._means.state()
        state = self._restored
        if self._optimizer is not None:
            state = {"projectors": self.objective.projectors.state_dict(), "optimizer": self._optimizer.state_dict()}
        if state:
            checkpoint["distillation_projectors"] = state

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the epoch's sums, and at the first batch the projectors."""
        self._means.restore(checkpoint.get("distillation_means", []), trainer.global_rank, trainer.world_size)
        self._restored = checkpoint.get("distillation_projectors", {})

    def _unwrap(self) -> None:
        if self._post_step is not None:
            self._post_step.remove()
        if self._wrapped is not None:
            vars(self._wrapped).pop(name := _step_name(self._wrapped), None)
            if self._original_step is not None:
                setattr(self._wrapped, name, self._original_step)
        self._wrapped = self._original_step = self._post_step = None

    def _step(self, module: Any, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """``training_step``, or the ``step`` inside of it, with its loss as one of the terms."""
        cached: Any = None
        if args and isinstance(args[0], CachedBatch):
            cached, args = args[0].cached_targets, (args[0].batch, *args[1:])
        weights = self.objective.weights(functools.partial(training_progress, module._trainer))
        first = self.objective.projects and not self.objective.projectors
        student, calls = self._student_of(module), list[_Call]()
        with capture(student, self.objective.student_layers(weights=None if first else weights)) as features:
            record = functools.partial(_record_call, calls, features)
            handle = student.register_forward_hook(record, with_kwargs=True)
            try:
                result = original(*args, **kwargs)
            finally:
                handle.remove()
        own = result.loss if isinstance(result, StepOutput) else result
        own = result.get("loss") if isinstance(result, Mapping) else own
        if not isinstance(own, Tensor):
            return result  # None skips the step; Lightning reports anything else
        batch = _Batch(args[0] if args else kwargs.get("batch"), cached)
        loss = self._loss(module, own, calls, weights, batch, first)
        if isinstance(result, StepOutput):
            if self.objective.projects:
                # The module weights its own gradients by these counts; the projectors are not part of it.
                self._global_mean.scale_loss(loss.detach(), result.positions, module.trainer)
            return result._replace(loss=loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _loss(
        self, module: Any, own: Tensor, calls: list[_Call], weights: Mapping[str, float], batch: "_Batch", first: bool
    ) -> Tensor:
        """The weighted sum of the terms; at the ``first`` batch the projectors are made."""
        active = {name for name, weight in weights.items() if weight}
        if not first and active and all(self.objective.terms[name].loss is None for name in active):
            # Only the module's own loss counts now: its network may have been called any number of times.
            terms = self.objective(Outputs(own), Outputs(None), weights, task_loss=lambda _: own)
            self._means.add(_without_sum(terms), torch.ones((), device=own.device))
            return terms["loss"]
        if len(calls) != 1:
            name = self.student or type(self._student_of(module)).__name__
            raise ValueError(
                f"'{name}' was called {len(calls)} times in a training_step of {type(module).__name__}: give "
                "DistillationCallback(student=...) the name of the submodule that makes its logits in one call. "
                "Code that was compiled in an earlier training takes no notice of hooks: torch.compiler.reset()"
            )
        [call] = calls
        if self.objective.compares_outputs or isinstance(module, SupervisedModule):
            scores = self._scores(module, batch.batch, call)
        else:
            scores = self._samples(own, batch.batch, call)
        outputs, targets = Outputs(scores.logits, call.features), Outputs(None)
        if first or self.objective.needs_teacher(weights):
            layers = self.objective.teacher_layers(None if first else weights)
            targets = self._targets(module, batch, call, layers, self.objective.needs_logits(weights))
        if first:
            self._make_projectors(outputs, targets, module.trainer.optimizers)
        terms = self.objective(
            outputs,
            targets,
            weights,
            task_loss=lambda _: own,
            valid=scores.valid,
            labels=scores.labels,
            tokens=scores.tokens,
        )
        weight = scores.valid.sum()
        if isinstance(module, SupervisedModule):
            weight = loss_weight(module.task, batch.batch)
        self._means.add(_without_sum(terms), weight)
        return terms["loss"]

    def _columns(self, call: _Call, batch: Any) -> dict[str, Any]:
        """What a mapping holds that the teacher names and the student was not called with, such as token types."""
        if isinstance(self.teacher, CachedTeacher) or not isinstance(batch, Mapping):
            return {}
        named = {name for keywords in self.teacher.keywords for name in (keywords or ())[len(call.args) :]}
        return {name: batch[name] for name in named & batch.keys() - set(LABELS)}

    def _scores(self, module: Any, batch: Any, call: _Call) -> Scores:
        """What is scored of the student's output; the first batch tells what it is."""
        if isinstance(module, SupervisedModule):
            return by_task(module, call.output, batch)
        student = self._student_of(module)
        logits = select_logits(call.output, self.logits, "the student")
        ignored = IGNORED if self.ignore_index is None else self.ignore_index
        tokens = tokens_of(call.kwargs)
        tokens = tokens_of(batch) if tokens is None else tokens
        if self.labels is None:
            labels = aligned_labels(unwrap(student, adapters=True), batch, tokens, ignored)
        else:
            labels = self.labels(batch)
        if self.objective.outputs is None:
            config = getattr(unwrap(student, adapters=True), "config", None)
            self._resolve(infer(logits, labels, config, ignored))
        assert self.objective.outputs is not None
        if self.valid is not None:
            return Scores(self.objective.outputs.scored(logits), self.valid(batch), labels, tokens)
        return by_labels(self.objective.outputs, logits, labels, tokens, ignored)

    def _samples(self, own: Tensor, batch: Any, call: _Call) -> Scores:
        """Every sample, for terms that compare layers only: whatever the student returns, it is not looked at."""
        tokens = tokens_of(call.kwargs)
        count = len(next(leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)))
        valid = torch.ones(count, dtype=torch.bool, device=own.device) if self.valid is None else self.valid(batch)
        return Scores(own, valid, None, tokens_of(batch) if tokens is None else tokens)

    def _targets(self, module: Any, batch: "_Batch", call: _Call, layers: list[str], logits: bool) -> Outputs:
        if isinstance(module, SupervisedModule):
            return task_targets(
                self.teacher, module.task, batch.batch, call.args, call.kwargs, batch.cached_targets, layers, logits
            )
        outputs = self.objective.outputs
        score = (lambda logits: logits) if outputs is None else outputs.scored
        kwargs = {**decoder_inputs(self._student_of(module), call.kwargs), **self._columns(call, batch.batch)}
        kwargs |= call.kwargs
        return targets_of(self.teacher, call.args, kwargs, batch.cached_targets, layers, logits, score)

    def _check_task(self, module: SupervisedModule) -> None:
        """Raises: ValueError: if an argument says what the module's task says already, or something else."""
        name, task = type(module).__name__, type(module.task).__name__
        for argument in ("valid", "labels", "logits", "ignore_index"):
            if getattr(self, argument) is not None:
                raise ValueError(f"{argument} is given, and the {name} knows it, by its task {task}: leave it out")
        if self.outputs not in (None, module.task.outputs):
            raise ValueError(f"outputs are {self.outputs}, and those of {task} {module.task.outputs}: leave it out")
        self._resolve(module.task.outputs)

    def _resolve(self, outputs: OutputType) -> None:
        self.objective.resolve(outputs)
        if isinstance(self.teacher, Teacher):
            self.teacher.check_outputs(outputs)

    def _make_projectors(self, outputs: Outputs, targets: Outputs, optimizers: list[torch.optim.Optimizer]) -> None:
        make_projectors(self.objective, outputs, targets)
        if self._restored:
            self.objective.projectors.load_state_dict(self._restored["projectors"])
        if parameters := list(self.objective.projectors.parameters()):
            self._optimizer = _optimizer_like(optimizers[0], parameters)
            if self._restored:
                self._optimizer.load_state_dict(self._restored["optimizer"])
        self._restored = {}

    def _step_projectors(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Runs after each step of the module's first optimizer."""
        if self._optimizer is None or all(each.grad is None for each in self.objective.projectors.parameters()):
            return  # no projectors yet, or their terms are still at weight 0
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"]
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)

    def _student_of(self, module: Any) -> nn.Module:
        if self.student is None:
            named = (getattr(module, name, None) for name in ("network", "model"))
            return next((network for network in named if isinstance(network, nn.Module)), module)
        try:
            return module.get_submodule(self.student)
        except AttributeError as error:
            names = [name for name, _ in module.named_children()]
            raise ValueError(
                f"student is '{self.student}', but {type(module).__name__} has no such submodule: it has {names}"
            ) from error


def _step_name(module: Any) -> str:
    """The method to wrap.

    The ``training_step`` of a SupervisedModule weights the loss of ``step`` by valid positions: the terms go into
    ``step``, so that they are weighted as well.
    """
    return "step" if isinstance(module, SupervisedModule) else "training_step"


def _record_call(calls: list[_Call], features: Features, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        calls.append(_Call(args, kwargs, output, features.take()))


def _without_sum(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in terms.items() if name != "loss"}


def _optimizer_like(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of the same class and defaults for ``parameters``."""
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    try:
        return type(optimizer)(parameters, **defaults)
    except TypeError as error:
        raise ValueError(
            f"no {type(optimizer).__name__} can be made for the projectors ({error}): compare features by a loss that "
            "needs none, or train the module with AdamW or SGD"
        ) from error
