"""Distillation for a LightningModule that was not written for it, in either Lightning namespace."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback
from torch import Tensor, nn

from distill.cache import CachedBatch, CachedTeacher
from distill.features import Features, capture
from distill.losses import LogitLoss
from distill.objective import Outputs, Term, average_gradients, make_projectors, objective_of
from distill.targets import TeacherLike, as_teacher, elapsed, targets_of
from workbench.models.positions import tokens_of
from workbench.tasks import logits_of
from workbench.training.means import GlobalMean, Means
from workbench.training.module import Step, SupervisedModule


class _Call(NamedTuple):
    """One forward pass of the student, with gradient."""

    args: Any
    kwargs: Any
    output: Any
    features: dict[str, Tensor]


@final
class DistillationCallback(Callback, OtherCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Lets the student of an unmodified LightningModule learn from a teacher beside its own loss.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * what ``training_step`` returned, or the weighted sum of
    ``losses``, in which a term without a loss is what ``training_step`` returned

    The student's logits are those that its network produced in the step; the teacher gets the same inputs, without
    ``labels``. ``training_step`` is wrapped while ``fit`` runs, and is as it was afterwards. Where no term of some
    weight needs the teacher, it is not asked. Logged per epoch: ``train/TERM``, the mean of each term, such as
    ``train/soft``. Every term is a mean over a micro-batch, as the module's own loss is: Lightning averages these over
    micro-batches and ranks, however many positions each has; a :class:`workbench.TaskModule` weighs them by the
    positions that its task scores, as it weighs its own loss.

    A cached teacher comes with the batches: ``trainer.fit(module, callback.attach(loader))``. ``training_step`` gets
    the batch as it was; other hooks of the module that look at training batches see a ``distill.cache.CachedBatch``.

    Projectors between unequal widths are made at the first batch and live beside the module. They are trained by an
    optimizer of the class and defaults of the module's first one, at the learning rate of its first group, right after
    it steps; gradient clipping leaves them out. The Trainer's checkpoint has them,
    as ``distillation_projectors``, and the module's ``state_dict`` has not.

    Args:
        teacher: A Teacher, a trained network, or where to load one from; or a CachedTeacher, or where to find a cache.
        temperature: T > 0.
        alpha: Weight of the soft targets, 0 (own loss only) to 1 (teacher only).
        student: Name of the submodule that makes the logits; ``network``, ``model`` or else the module itself if None.
        valid: Batch -> bool tensor of the logits' shape without the classes: the positions that count, e.g.
            ``lambda batch: batch["labels"] != -100``. All if None.
        losses: The terms of the objective by name, instead of ``temperature`` and ``alpha``; features of the student
            are named as in the submodule that makes the logits.
        labels: Batch -> classes at these positions, for losses that need them. If None, ``labels`` of a mapping, or the
            last entry of a tuple.

    Raises:
        ValueError: If alpha, the temperature or a term is out of range; when training starts, if the module has no such
            part or steps its optimizers by hand; in training, if the part was not called exactly once, did not return
            logits, or its classes are not the teacher's, or what a term compares is not there.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        teacher: TeacherLike,
        temperature: float = 4.0,
        alpha: float = 0.9,
        student: str | None = None,
        valid: Callable[[Any], Tensor] | None = None,
        losses: Mapping[str, Term] | None = None,
        labels: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.objective = objective_of(temperature, alpha, losses)
        self.teacher = as_teacher(teacher)
        self.student, self.valid, self.labels = student, valid, labels
        self._means = Means()
        self._global_mean = GlobalMean()
        self._wrapped: Any = None
        self._before: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: Any = None
        self._after_step: Any = None
        self._restored: dict[str, Any] = {}

    def attach(self, loader: Any) -> Any:
        """The training loader, its batches with the cached teacher's outputs; as it is if the teacher is live."""
        return self.teacher.attach(loader) if isinstance(self.teacher, CachedTeacher) else loader

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the projectors of an earlier fit."""
        if stage == "fit":
            self.objective.projectors.clear()
            self._optimizer, self._scaler, self._restored = None, None, {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap ``training_step``, or what a module here makes it of."""
        self._unwrap()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its optimizers by hand, so its loss cannot be changed from outside: "
                "add distill.losses.soft_target to the loss in its training_step"
            )
        self._student_of(pl_module)
        name = _step_name(pl_module)
        original = getattr(pl_module, name)
        if isinstance(getattr(getattr(original, "func", None), "__self__", None), DistillationCallback):
            raise ValueError(f"{type(pl_module).__name__} has a DistillationCallback already: give the Trainer one")
        # A partial, not a closure: it is copied along with a module that is copied in training.
        step = functools.update_wrapper(functools.partial(self._step, pl_module, original), original)
        self._wrapped, self._before = pl_module, vars(pl_module).get(name)
        setattr(pl_module, name, step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Follow the module's first optimizer."""
        self._global_mean = GlobalMean()
        if self.objective.projects and trainer.optimizers:
            self._after_step = trainer.optimizers[0].register_step_post_hook(self._step_projectors)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give ``training_step`` back."""
        self._unwrap()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give ``training_step`` back, whatever happened."""
        self._unwrap()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the epoch's mean."""
        self._means.reset()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch's mean."""
        self._means.log(pl_module, "train/")
        self._means.reset()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clear the projectors' gradients when the module's first optimizer does."""
        if trainer.optimizers and optimizer is trainer.optimizers[0]:
            self.objective.projectors.zero_grad()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Share the projectors' gradients between ranks, and between micro-batches as the module's."""
        if trainer.optimizers and optimizer is trainer.optimizers[0]:
            average_gradients(self.objective)
            self._global_mean.settle(self.objective.projectors.parameters(), trainer)
            self._scaler = getattr(trainer.precision_plugin, "scaler", None)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's sums so far, and the projectors with their optimizer."""
        checkpoint["distillation_means"] = self._means.state()
        state = self._restored
        if self._optimizer is not None:
            state = {"projectors": self.objective.projectors.state_dict(), "optimizer": self._optimizer.state_dict()}
        if state:
            checkpoint["distillation_projectors"] = state

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's sums, and at the first batch from its projectors."""
        self._means.restore(checkpoint.get("distillation_means", []), trainer.global_rank, trainer.world_size)
        self._restored = checkpoint.get("distillation_projectors", {})

    def _unwrap(self) -> None:
        if self._after_step is not None:
            self._after_step.remove()
        if self._wrapped is not None:
            vars(self._wrapped).pop(name := _step_name(self._wrapped), None)
            if self._before is not None:
                setattr(self._wrapped, name, self._before)
        self._wrapped = self._before = self._after_step = None

    def _step(self, module: Any, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """``training_step``, or the ``step`` inside of it, its loss one of the terms."""
        cached: Any = None
        if args and isinstance(args[0], CachedBatch):
            cached, args = args[0].cached_targets, (args[0].batch, *args[1:])
        weights = self.objective.weights(functools.partial(elapsed, module._trainer))
        new = self.objective.projects and not self.objective.projectors
        part, calls = self._student_of(module), list[_Call]()
        with capture(part, self.objective.student_layers(weights=None if new else weights)) as features:
            keep = functools.partial(_keep, calls, features)
            handle = part.register_forward_hook(keep, with_kwargs=True)
            try:
                result = original(*args, **kwargs)
            finally:
                handle.remove()
        own = result.loss if isinstance(result, Step) else result
        own = result.get("loss") if isinstance(result, Mapping) else own
        if not isinstance(own, Tensor):
            return result  # no step to take, or an error that Lightning words
        batch = args[0] if args else kwargs.get("batch")
        loss = self._total_loss(module, own, calls, weights, batch, cached, new)
        if isinstance(result, Step):
            if self.objective.projects:
                # Projectors are none of the module, whose own mean sees the same counts.
                self._global_mean.weigh(loss.detach(), result.positions, module.trainer)
            return result._replace(loss=loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _total_loss(
        self,
        module: Any,
        own: Tensor,
        calls: list[_Call],
        weights: Mapping[str, float],
        batch: Any,
        cached: Mapping[str, Tensor] | None,
        new: bool,
    ) -> Tensor:
        """The weighted sum of the terms; ``new``: the projectors are still to be made."""
        counting = {name for name, weight in weights.items() if weight}
        if not new and counting and all(self.objective.terms[name].loss is None for name in counting):
            # Nothing but the module's own loss: whatever the module did is fine, and there need not be logits.
            terms = self.objective(Outputs(own), Outputs(None), weights, own=lambda _: own)
            self._means.add(_without_sum(terms), torch.ones((), device=own.device))
            return terms["loss"]
        if len(calls) != 1:
            name = self.student or type(self._student_of(module)).__name__
            raise ValueError(
                f"'{name}' was called {len(calls)} times in a training_step of {type(module).__name__}: give "
                "DistillationCallback(student=...) the name of the submodule that makes its logits in one call"
            )
        [call] = calls
        seen = Outputs(logits_of(call.output, "the student"), call.features)
        targets = Outputs(None)
        if new or self.objective.needs_teacher(weights):
            layers = self.objective.teacher_layers(None if new else weights)
            asks = self.objective.needs_logits(weights)
            targets = targets_of(self.teacher, call.args, call.kwargs, cached, layers, asks)
        if new:
            self._make_projectors(seen, targets, module.trainer.optimizers)
        assert seen.logits is not None
        every = torch.ones(seen.logits.shape[:-1], dtype=torch.bool, device=seen.logits.device)
        valid = every if self.valid is None else self.valid(batch)
        tokens = tokens_of(call.kwargs)
        terms = self.objective(
            seen,
            targets,
            weights,
            own=lambda _: own,
            valid=valid,
            labels=self._labels(batch),
            tokens=tokens_of(batch) if tokens is None else tokens,
        )
        self._means.add(_without_sum(terms), valid.sum())
        return terms["loss"]

    def _make_projectors(self, seen: Outputs, targets: Outputs, optimizers: list[torch.optim.Optimizer]) -> None:
        make_projectors(self.objective, seen, targets)
        if self._restored:
            self.objective.projectors.load_state_dict(self._restored["projectors"])
        if parameters := list(self.objective.projectors.parameters()):
            self._optimizer = _optimizer_like(optimizers[0], parameters)
            if self._restored:
                self._optimizer.load_state_dict(self._restored["optimizer"])
        self._restored = {}

    def _step_projectors(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """What happens after each step of the module's first optimizer."""
        if self._optimizer is None or all(each.grad is None for each in self.objective.projectors.parameters()):
            return  # there is nothing yet, before a warm-up
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"]
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)

    def _labels(self, batch: Any) -> Tensor | None:
        if not any(isinstance(loss, LogitLoss) and loss.needs_labels for loss in self.objective.losses.values()):
            return None
        if self.labels is not None:
            return self.labels(batch)
        if isinstance(batch, Mapping):
            return batch.get("labels")
        return batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None

    def _student_of(self, module: Any) -> nn.Module:
        if self.student is None:
            parts = (getattr(module, name, None) for name in ("network", "model"))
            return next((part for part in parts if isinstance(part, nn.Module)), module)
        try:
            return module.get_submodule(self.student)
        except AttributeError as error:
            names = [name for name, _ in module.named_children()]
            raise ValueError(
                f"student is '{self.student}', but {type(module).__name__} has no such submodule: it has {names}"
            ) from error


def _step_name(module: Any) -> str:
    """The method whose loss becomes a term: what comes before, where ``training_step`` weighs micro-batches."""
    return "step" if isinstance(module, SupervisedModule) else "training_step"


def _keep(calls: list[_Call], features: Features, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        calls.append(_Call(args, kwargs, output, features.take()))


def _without_sum(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in terms.items() if name != "loss"}


def _optimizer_like(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of the same class and defaults."""
    known = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in known}
    try:
        return type(optimizer)(parameters, **defaults)
    except TypeError as error:
        raise ValueError(
            f"no {type(optimizer).__name__} can be made for the projectors ({error}): compare features by a loss that "
            "needs none, or train the module with AdamW or SGD"
        ) from error
