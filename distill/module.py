"""DistillModule: a student and its teacher as a LightningModule, and the ``distill`` job."""

from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from distill.losses import check_alpha, check_temperature, mix, soft_target
from distill.teacher import Teacher
from workbench.duration import Duration
from workbench.module import LRSchedulerCallable, OptimizerCallable, SupervisedModule
from workbench.source import Source
from workbench.tasks import Task
from workbench.training import check_namespace, task_for, train_and_save, trains


@final
class DistillModule(SupervisedModule):
    """A student trained on its teacher's temperature-softened outputs and on the labels.

    loss = alpha * T^2 KL(teacher || student) + (1 - alpha) * task loss

    The teacher is frozen, in eval mode and outside the module tree: not in ``parameters()``, the optimizer, DDP or
    any checkpoint. Logged: ``train/loss``, ``train/soft``, ``train/hard``. At alpha 0 it is not asked at all, and there
    is no ``train/soft``; at alpha 1 the task loss is only logged.

    Args:
        student: The network to train, ``network`` from then on.
        teacher: A Teacher, a trained network, or where to load one from.
        task: Loss on labels, and metrics.
        temperature: T > 0.
        alpha: Weight of the soft targets, 0 (labels only) to 1 (teacher only).
        optimizer: Parameters -> optimizer; AdamW at 1e-3 if None.
        lr_scheduler: Optimizer -> scheduler, stepped once an epoch; constant if None.

    Raises:
        ValueError: If alpha is outside [0, 1] or the temperature is not positive; in training, if the teacher's
            classes are not the student's.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | Source | Path,
        task: Task,
        temperature: float = 4.0,
        alpha: float = 0.9,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_alpha(alpha)
        check_temperature(temperature)
        super().__init__(student, task, optimizer, lr_scheduler)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.temperature = temperature
        self.alpha = alpha

    def terms(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        """Soft and hard loss and their weighted sum."""
        hard = self.task.loss(output if self.alpha < 1 else output.detach(), batch)
        if self.alpha == 0:
            return {"loss": hard, "hard": hard}
        args, kwargs = self.task.inputs(batch)
        targets = self.task.output(self.teacher(*args, **kwargs))
        soft = soft_target(output, targets, self.temperature, self.task.valid(batch))
        return {"loss": mix(soft, hard, self.alpha), "soft": soft, "hard": hard}


def module_for(
    model: nn.Module,
    teacher: Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
) -> DistillModule:
    """The module that :func:`distill` trains."""
    check_namespace(model)
    if isinstance(model, LightningModule):
        raise ValueError(
            f"the student {type(model).__name__} is a LightningModule, whose own training_step and optimizer would not "
            "be used here: give its network, or fit it with distill.DistillationCallback in trainer.callbacks"
        )
    return DistillModule(model, teacher, task_for(data, task), temperature, alpha, optimizer, lr_scheduler)


@trains(module_for)
def distill(
    model: nn.Module,
    teacher: Source,
    data: LightningDataModule,
    task: Task | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: dict[str, Any] | None = None,
    seed_everything: int = 0,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    out: Path = Path("runs/distill"),
) -> dict[str, Any]:
    """Train a student on its teacher's temperature-softened outputs and on the labels (Hinton et al. 2015).

    Args:
        model: The student network.
        teacher: A stage of the recipe that trained one, or a folder or hub name to load one from.
        data: The data module.
        task: Loss and metrics; by default classification over the data module's `classes`.
        temperature: Softens both outputs; the loss is scaled by its square.
        alpha: Weight of the soft targets, 0 (labels only) to 1 (teacher only).
        optimizer: AdamW at 1e-3 by default.
        lr_scheduler: Stepped once an epoch; constant by default.
        trainer: Arguments of Lightning's Trainer; `max_epochs` or `max_steps` is needed.
        seed_everything: Seed of the initial weights, the data order and everything random in training.
        checkpoint: How often the checkpoint that a stopped stage resumes from is written, e.g. 1ep or 500it.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, history and size, for the record.
    """
    module = module_for(model, teacher, data, task, temperature, alpha, optimizer, lr_scheduler)
    return train_and_save(module, data, trainer, seed_everything, out, checkpoint)
