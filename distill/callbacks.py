"""Distillation for a LightningModule that was not written for it, in either Lightning namespace."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback
from torch import Tensor, nn

from distill.losses import check_alpha, check_temperature, mix, soft_target
from distill.teacher import Teacher
from workbench.module import Means
from workbench.source import Source


@final
class DistillationCallback(Callback, OtherCallback):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Lets the student of an unmodified LightningModule learn from a teacher beside its own loss.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * what ``training_step`` returned

    The student's logits are those that its network produced in the step; the teacher gets the same inputs, without
    ``labels``. ``training_step`` is wrapped while ``fit`` runs, and is as it was afterwards. At alpha 0 the teacher is
    not asked. Logged per epoch: ``train/soft``, the mean soft-target loss.

    Args:
        teacher: A Teacher, a trained network, or where to load one from.
        temperature: T > 0.
        alpha: Weight of the soft targets, 0 (own loss only) to 1 (teacher only).
        student: Name of the submodule that makes the logits; ``network``, ``model`` or else the module itself if None.
        valid: Batch -> bool tensor of the logits' shape without the classes: the positions that count, e.g.
            ``lambda batch: batch["labels"] != -100``. All if None.

    Raises:
        ValueError: If alpha or the temperature is out of range; when training starts, if the module has no such part
            or steps its optimizers by hand; in training, if the part was not called exactly once, did not return
            logits, or its classes are not the teacher's.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module | Source | Path,
        temperature: float = 4.0,
        alpha: float = 0.9,
        student: str | None = None,
        valid: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_alpha(alpha)
        check_temperature(temperature)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.temperature, self.alpha, self.student, self.valid = temperature, alpha, student, valid
        self._means = Means()
        self._wrapped: Any = None
        self._before: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap ``training_step``."""
        self._unwrap()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its optimizers by hand, so its loss cannot be changed from outside: "
                "add distill.losses.soft_target to the loss in its training_step"
            )
        self._part(pl_module)
        if self.alpha == 0:
            return
        original = pl_module.training_step
        if isinstance(getattr(getattr(original, "func", None), "__self__", None), DistillationCallback):
            raise ValueError(f"{type(pl_module).__name__} has a DistillationCallback already: give the Trainer one")
        # A partial, not a closure: it is copied along with a module that is copied in training.
        step = functools.update_wrapper(functools.partial(self._step, pl_module, original), original)
        self._wrapped, self._before = pl_module, vars(pl_module).get("training_step")
        pl_module.training_step = step

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

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's sums so far."""
        checkpoint["distillation_means"] = self._means.state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's sums."""
        self._means.restore(checkpoint.get("distillation_means", []), trainer.global_rank, trainer.world_size)

    def _unwrap(self) -> None:
        if self._wrapped is not None:
            vars(self._wrapped).pop("training_step", None)
            if self._before is not None:
                self._wrapped.training_step = self._before
        self._wrapped = self._before = None

    def _step(self, module: Any, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """``training_step``, its loss mixed with the teacher's."""
        calls: list[tuple[Any, Any, Any]] = []

        def capture(_: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                calls.append((inputs, named, output))

        handle = self._part(module).register_forward_hook(capture, with_kwargs=True)
        try:
            result = original(*args, **kwargs)
        finally:
            handle.remove()
        own = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(own, Tensor):
            return result  # no step to take, or an error that Lightning words
        batch = args[0] if args else kwargs.get("batch")
        loss = mix(self._soft(module, calls, batch), own, self.alpha)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _soft(self, module: Any, calls: list[tuple[Any, Any, Any]], batch: Any) -> Tensor:
        if len(calls) != 1:
            name = self.student or type(self._part(module)).__name__
            raise ValueError(
                f"'{name}' was called {len(calls)} times in a training_step of {type(module).__name__}: give "
                "DistillationCallback(student=...) the name of the submodule that makes its logits in one call"
            )
        [(inputs, named, output)] = calls
        student = _logits(output, "student")
        named = {name: value for name, value in named.items() if name != "labels"}
        teacher = _logits(self.teacher(*inputs, **named), "teacher")
        valid = None if self.valid is None else self.valid(batch)
        soft = soft_target(student, teacher, self.temperature, valid)
        positions = torch.ones(student.shape[:-1], device=student.device) if valid is None else valid
        self._means.add({"soft": soft}, positions.sum())
        return soft

    def _part(self, module: Any) -> nn.Module:
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


def _logits(output: Any, who: str) -> Tensor:
    """The tensor itself, or ``logits`` of a mapping or of a transformers output."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    raise ValueError(
        f"the {who} returned {type(output).__name__} without logits: return a tensor or an output with them"
    )
