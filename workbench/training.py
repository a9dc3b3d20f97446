"""Training one module to the end, resumably, and the ``fit`` job."""

import copy
import hashlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import artifact, progress, records
from workbench.continuation import Continuation, History, Resumable, ShowProgress, restore_ended
from workbench.duration import Duration
from workbench.files import replacing
from workbench.module import (
    LRSchedulerCallable,
    OptimizerCallable,
    SupervisedModule,
    TaskModule,
    network_of,
    with_optimizer,
)
from workbench.order import ordered
from workbench.tasks import Classification, Task

JobT = TypeVar("JobT", bound=Callable[..., Any])
_DEFAULTS: dict[str, Any] = {
    "logger": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
_SAMPLES = 16
# Importing pytorch_lightning beside lightning.pytorch makes it the speaker of both.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_NOISE = (
    "does not have many workers",
    "smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def trains(build: Callable[..., LightningModule]) -> Callable[[JobT], JobT]:
    """Mark a job as one that trains the module that ``build`` makes of the job's arguments of the same names.

    Other jobs find it there: a hunt that starts from a stage trains what the stage trained.
    """

    def mark(job: JobT) -> JobT:
        setattr(job, "build", build)  # noqa: B010 - a function has no declared attribute of that name
        return job

    return mark


def task_for(data: LightningDataModule, task: Task | None) -> Task:
    """The task given, else classification over the data module's ``classes``.

    Raises:
        ValueError: If there is neither.
    """
    if task is not None:
        return task
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
        task: Loss and metrics; by default classification over the data module's `classes`.
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
    module = module_for(model, data, task, optimizer, lr_scheduler)
    start = None if ckpt_path is None else Path(ckpt_path)
    return train_and_save(module, data, trainer, seed_everything, out, checkpoint, start)


def train_and_save(
    module: LightningModule,
    data: LightningDataModule,
    trainer: Mapping[str, Any] | None,
    seed: int,
    out: Path,
    checkpoint: Duration,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train ``module``, then write its network as ``out/artifact`` with a few inputs beside it.

    A family's are ``out/NAME/artifact``, each with a record of its own, and in the result under ``students``.
    """
    result = train(module, data, trainer=trainer, seed=seed, out=out, checkpoint=checkpoint, start=start)
    masks = result.pop("masks")
    family = module.family if isinstance(module, SupervisedModule) else ()
    if not family:
        save_network(module, data, out, result, masks)
    for name in family:
        mine = {"metrics": _of_member(result["metrics"], name), "monitor": result["monitor"]}
        mine["history"] = [_of_member(row, name) for row in result["history"]]
        kept = {key.removeprefix(f"{name}."): mask for key, mask in (masks or {}).items() if key.startswith(f"{name}.")}
        save_network(module, data, out / name, mine, kept or None, member=name)
        if rank() == 0:
            records.write(out / name, {"stage": f"{out.name}/{name}", "status": "finished", **mine})
        result.setdefault("students", {})[name] = mine
    return result


def _of_member(row: Mapping[str, float], member: str) -> dict[str, float]:
    """Those numbers of a row that are of one student, and those that are of none."""
    found: dict[str, float] = {}
    for name, value in row.items():
        split, _, rest = name.partition("/")
        whose, _, metric = rest.partition("/")
        if not metric or whose == member:
            found[f"{split}/{metric}" if metric else name] = value
    return found


def train(
    module: LightningModule,
    data: LightningDataModule,
    *,
    trainer: Mapping[str, Any] | None,
    seed: int,
    out: Path,
    checkpoint: Duration = Duration(1, "ep"),  # noqa: B008 - frozen
    start: Path | None = None,
    callbacks: Sequence[Callback] = (),
    part: tuple[int, int, str] = (0, 1, ""),
) -> dict[str, Any]:
    """Train ``module`` to the end of ``trainer``'s budget, from where an earlier call with ``out`` was stopped.

    On CPU the result is the same, bit for bit, however often it was stopped: the order of the data is a function of
    seed and epoch, and checkpoints hold the random state of every rank. Two things are not restored in the middle of an
    epoch, only at its end: random numbers drawn in loader workers, and the place of a loader with a sampler of its own.

    Args:
        module: What is trained, in place.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of the data order and everything random in training.
        out: The folder of ``checkpoints/last.ckpt``.
        checkpoint: How often that is written.
        start: A Lightning checkpoint to start from, if there is none in ``out`` yet.
        callbacks: More of them.
        part: Which of how many trainings of the stage this is, and its label, for the progress bar.

    Returns:
        ``metrics`` of the last epoch's weights on the validation and test splits, ``history`` (a row an epoch),
        ``monitor`` (the main metric and its direction), ``seconds``; and ``masks``, those a callback kept, or None.

    Raises:
        ValueError: If the trainer has no budget, or its world size is not the launcher's.
    """
    if checkpoint.value < 1:
        raise ValueError(f"checkpoint is {checkpoint}: give at least 1ep or 1it")
    began = time.monotonic()
    last = out / "checkpoints" / "last.ckpt"
    history = History()
    ended = out / "checkpoints" / "ended.ckpt"
    own = [*callbacks, Continuation(), history, ShowProgress(*part), Resumable(last, ended, checkpoint)]
    with _quiet(progress.current() is not None):
        seed_everything(seed, workers=True, verbose=False)
        made = make_trainer(trainer, own, out)
        module.train()
        every: list[Callback] = made.callbacks  # type: ignore[attr-defined]
        if ended.is_file():
            restore_ended(ended, module, every)
        else:
            with _ordered(module, data, seed, made):
                made.fit(module, datamodule=data, ckpt_path=last if last.is_file() else start, weights_only=False)
            if made.interrupted:
                raise KeyboardInterrupt
            if made.global_step == 0:
                raise ValueError("training took no step: give max_epochs or max_steps, and batches, above 0")
        metrics = _evaluate(made, module, data)
    task = getattr(module, "task", None)
    return {
        "metrics": metrics,
        "history": history.rows,
        "monitor": list(task.monitor) if isinstance(task, Task) else ["loss", "min"],
        "world_size": made.world_size,
        "seconds": round(time.monotonic() - began, 3),
        "masks": next((found for callback in every if (found := getattr(callback, "masks", None))), None),
    }


def make_trainer(arguments: Mapping[str, Any] | None, callbacks: Sequence[Callback], out: Path) -> Trainer:
    """A Trainer with this project's defaults under ``arguments`` and ``callbacks`` after its own."""
    arguments = dict(arguments or {})
    if arguments.get("max_epochs") is None and arguments.get("max_steps", -1) in (-1, None):
        raise ValueError("trainer has neither max_epochs nor max_steps: say how long to train, e.g. {max_epochs: 10}")
    # One Trainer is made per level of a hunt: each gets callbacks and loggers of its own.
    theirs = copy.deepcopy(arguments.pop("callbacks", None) or [])
    given = {name: copy.deepcopy(value) for name, value in arguments.items() if value is not None}
    defaults = {**_DEFAULTS, "default_root_dir": str(out), "enable_progress_bar": progress.current() is None}
    # Always so: the stage keeps its resume point, and its order is split over the ranks already.
    for name in ("enable_checkpointing", "use_distributed_sampler"):
        given.pop(name, None)
    made = Trainer(**{**defaults, **given}, callbacks=[*_as_list(theirs), *callbacks])
    check_world_size(made.world_size)
    return made


def check_world_size(world_size: int) -> None:
    """Refuse to run N independent trainings under a launcher that means one training of N processes.

    Raises:
        ValueError: If torchrun's or Lightning's launcher started another number of processes than ``world_size``.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        launched = torch.distributed.get_world_size()
    elif "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        return  # nobody has launched anything yet; a Trainer of several devices will
    if launched != world_size:
        raise ValueError(
            f"the launcher started {launched} processes, but this stage's trainer has a world size of {world_size}: "
            f"set trainer.devices and trainer.num_nodes so that they multiply to {launched}, with strategy ddp, "
            "for every training stage"
        )


def save_network(
    module: LightningModule,
    data: LightningDataModule,
    out: Path,
    result: dict[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    example: bool = True,
    member: str = "",
) -> None:
    """Write the shipped network to ``out/artifact`` and inputs to try it on to ``out/example.safetensors``.

    Of a family it is the network called ``member``. Adds ``size`` to ``result``. On ranks above zero only that.
    """
    network = network_of(module).get_submodule(member)
    folder = out / "artifact"
    check_ranks_agree(network)
    if rank() == 0:
        if artifact.describe(network) is None:
            warnings.warn(
                f"{type(network).__name__} does not say what it was built with, so its checkpoint loads only into a "
                "given module: load(path, model=...). Let it keep its arguments, as JSON, in self.init_args, or "
                "call save_hyperparameters() in a LightningModule",
                stacklevel=2,
            )
        artifact.save(network, folder, masks, provenance={"metrics": result["metrics"]})
        if example and (inputs := example_inputs(module, data)):
            with replacing(out / "example.safetensors") as temporary:
                save_file(inputs, temporary)
    barrier()
    result["size"] = size_of(network, masks, folder)


def size_of(network: nn.Module, masks: Mapping[str, Tensor] | None, folder: Path) -> dict[str, int]:
    """Counts of weights under each of their names, and bytes: dense in fp32, and of the checkpoint in ``folder``."""
    parameters = list(network.parameters())
    pruned = (
        {
            "prunable": sum(mask.numel() for mask in masks.values()),
            "kept": sum(int(mask.sum()) for mask in masks.values()),
        }
        if masks
        else {}
    )
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        **pruned,
        "nonzero": sum(int(parameter.detach().count_nonzero()) for parameter in parameters),
        "dense_fp32_bytes": 4 * sum(parameter.numel() for parameter in parameters),
        "artifact_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }


def example_inputs(module: LightningModule, data: LightningDataModule) -> dict[str, Tensor]:
    """Up to 16 validation inputs by name, ``input_0``, ... for positional ones; empty if they are not tensors."""
    if not is_overridden("val_dataloader", data, LightningDataModule):
        return {}
    data.setup("validate")
    loader = data.val_dataloader()
    while isinstance(loader, (Mapping, list, tuple)):
        loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
    batch = next(iter(loader))
    task = getattr(module, "task", None)
    if isinstance(task, Task):
        args, kwargs = task.inputs(batch)
    elif isinstance(batch, Mapping):
        args, kwargs = (), {name: value for name, value in batch.items() if name not in ("label", "labels")}
    else:
        args, kwargs = (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}
    named = {**{f"input_{i}": value for i, value in enumerate(args)}, **kwargs}
    if not all(isinstance(value, Tensor) for value in named.values()):
        return {}
    return {name: value[:_SAMPLES].detach().cpu().contiguous() for name, value in named.items()}


def rank() -> int:
    """This process's global rank: of the process group if there is one, else as the launcher says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def check_ranks_agree(network: nn.Module) -> None:
    """Make sure that data-parallel ranks hold the same parameters, bit for bit.

    Raises:
        RuntimeError: If they do not: then what rank 0 is about to save is not what was trained.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks hold different parameters after training: SHA-256 {[d[:12] for d in digests]}")


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _evaluate(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics of the weights as they are now, on the splits that the data module and the module both have."""
    metrics: dict[str, float] = {}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        step = "validation_step" if split == "val" else "test_step"
        if is_overridden(f"{split}_dataloader", data, LightningDataModule) and is_overridden(step, module):
            for row in run(module, datamodule=data, verbose=False):
                metrics.update({name: float(value) for name, value in row.items()})
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        warnings.warn(f"{', '.join(bad)}: not finite after training", stacklevel=3)
    return metrics


@contextmanager
def _ordered(module: LightningModule, data: LightningDataModule, seed: int, trainer: Trainer) -> Iterator[None]:
    """Inside, the data module's training loader is as the module wants it, in an order of (seed, epoch) alone."""
    original = data.train_dataloader
    attach = module.attach if isinstance(module, SupervisedModule) else (lambda loader: loader)

    def train_dataloader() -> Any:
        if trainer.overfit_batches:  # type: ignore[attr-defined] - the same few batches every epoch, by Lightning
            return attach(original())
        return ordered(attach(original()), seed, trainer.global_rank, trainer.world_size)

    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    try:
        yield
    finally:
        del data.train_dataloader


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Inside, Lightning says only what matters: not, for every level of a hunt, which devices it did not find."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", f".*{message}")
        try:
            for logger in loggers if quiet else ():
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
