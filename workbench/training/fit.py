"""The ``fit`` and ``pretrained`` jobs, and the module that a model, data and task make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from workbench.duration import Duration
from workbench.tasks import Classification, Task
from workbench.training.loop import evaluate, monitor_of, train_and_save
from workbench.training.module import LRSchedulerCallable, OptimizerCallable, TaskModule, with_optimizer
from workbench.training.save import save_network

JobT = TypeVar("JobT", bound=Callable[..., Any])


def trains(build: Callable[..., LightningModule]) -> Callable[[JobT], JobT]:
    """Mark a job as training the module that ``build`` makes of the job's arguments of the same names.

    Other jobs use it: a hunt that starts from a stage trains the module that the stage trained.
    """

    def mark(job: JobT) -> JobT:
        setattr(job, "build", build)  # noqa: B010 - a function has no declared attribute of that name
        return job

    return mark


def task_for(data: LightningDataModule, task: Task | None) -> Task:
    """``task``, else the data module's ``task``, else classification over its ``classes``.

    Raises:
        ValueError: If the data module has neither.
    """
    own = getattr(data, "task", None) if task is None else task
    if isinstance(own, Task):
        return own
    classes = getattr(data, "classes", None)
    if not isinstance(classes, int):
        raise ValueError(
            f"no task is given and {type(data).__name__} has no attribute 'classes' to make a classification of: "
            "give task, e.g. {class_path: workbench.tasks.Classification, init_args: {classes: 10}}"
        )
    return Classification(classes)


def module_for(
    model: nn.Module,
    data: LightningDataModule,
    *,
    task: Task | None = None,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
) -> LightningModule:
    """``model`` itself if it is a LightningModule, else a TaskModule of it."""
    check_namespace(model)
    if not isinstance(model, LightningModule):
        return TaskModule(model, task_for(data, task), optimizer, lr_scheduler)
    if task is not None:
        raise ValueError(f"task is given, but {type(model).__name__} is a LightningModule with a loss of its own")
    return with_optimizer(model, optimizer, lr_scheduler)


def check_namespace(module: nn.Module) -> None:
    """Refuse a module of the other Lightning namespace, which this Trainer cannot run.

    Raises:
        ValueError: If ``module`` derives from pytorch_lightning's LightningModule.
    """
    foreign = any(cls.__module__.startswith("pytorch_lightning.") for cls in type(module).__mro__)
    if foreign and not isinstance(module, LightningModule):
        raise ValueError(
            f"{type(module).__name__} is a pytorch_lightning.LightningModule: recipes train lightning.pytorch ones; "
            "change its import to 'from lightning.pytorch import LightningModule'"
        )


@trains(module_for)
def fit(
    model: nn.Module,
    data: LightningDataModule,
    task: Task | None = None,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    trainer: dict[str, Any] | None = None,
    seed_everything: int = 0,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    ckpt_path: str | None = None,
    out: Path = Path("runs/fit"),
) -> dict[str, Any]:
    """Train a network on labels: the dense baseline, or the teacher.

    Args:
        model: A network, or a LightningModule of your own, which brings its loss, metrics and optimizer.
        data: The data module.
        task: Loss and metrics; by default the data module's own `task`, else classification over its `classes`.
        optimizer: AdamW at 1e-3 by default.
        lr_scheduler: Stepped once an epoch; constant by default.
        trainer: Arguments of Lightning's Trainer; `max_epochs` or `max_steps` is needed.
        seed_everything: Seed of the initial weights, the data order and everything random in training.
        checkpoint: How often the checkpoint that a stopped stage resumes from is written, e.g. 1ep or 500it.
        ckpt_path: A Lightning checkpoint to start from.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics, history and size, for the record.
    """
    module = module_for(model, data, task=task, optimizer=optimizer, lr_scheduler=lr_scheduler)
    return train_and_save(
        module,
        data,
        out,
        trainer=trainer,
        seed=seed_everything,
        checkpoint=checkpoint,
        start=None if ckpt_path is None else Path(ckpt_path),
    )


def pretrained(
    model: nn.Module,
    data: LightningDataModule | None = None,
    task: Task | None = None,
    out: Path = Path("runs/pretrained"),
) -> dict[str, Any]:
    """Make an already trained network a stage, which other stages use as their teacher or cut a student from.

    Args:
        model: The network with its weights, e.g. of `workbench.models.hub.pretrained`.
        data: The data module to score it on and to take stored example inputs from; without it, neither is done.
        task: Loss and metrics; by default the data module's own `task`, else classification over its `classes`.
        out: The stage's folder, given by the recipe.

    Returns:
        Metrics and size, for the record.
    """
    module: LightningModule = (
        TaskModule(model, task or Classification(2)) if data is None else module_for(model, data, task=task)
    )
    metrics = {} if data is None else evaluate(module, data, out)
    result: dict[str, Any] = {"metrics": metrics, "monitor": list(monitor_of(module))}
    save_network(module, data, out, result)
    return result
