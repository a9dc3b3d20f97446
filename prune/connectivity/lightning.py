"""The error barrier between two trained states of a LightningModule, evaluated by a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from prune.connectivity.interpolation import SPLITS, Split, barrier
from prune.connectivity.states import batch_norms, temporary_states
from workbench.messages import some
from workbench.models.forward import forward
from workbench.randomness import random_state, same_random_state, set_random_state
from workbench.tasks import Task
from workbench.training.calibration import FirstBatches, batch_runner
from workbench.training.fit import check_namespace
from workbench.training.loop import make_trainer, quiet_lightning, training_loader
from workbench.training.module import network_of

# The step that evaluates a split, the stage that its data is set up for, and the loader that the Trainer asks for.
_STEPS = {"train": "validation_step", "val": "validation_step", "test": "test_step"}
_STAGES = {"train": "fit", "val": "validate", "test": "test"}
_LOADERS = {"train": "val", "val": "val", "test": "test"}
_EVALUATION_ONLY: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "callbacks": None,
    "logger": False,
    "enable_progress_bar": False,
    "barebones": False,
}


class _Evaluation(NamedTuple):
    """One point on the line: the metric that was logged, and its height."""

    metric: str
    is_error: bool
    height: float


def error_barrier(
    module: LightningModule,
    data: LightningDataModule,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    points: int = 11,
    split: Split = "val",
    recalibrate: int | Iterable[Any] | None = 16,
    metric: tuple[str, Literal["min", "max"]] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The error barrier between two states of the module's network, for a record.

    One Trainer evaluates all points, on one loader, each from the same random state. Afterwards, also after an
    exception, the network's weights, buffers and modes, the module's trainer, the data module and the random state are
    as they were. Called on every rank.

    Args:
        module: The module whose network the states are of.
        data: Its data module.
        a: A state dict of the module's ``network``, or of the module itself if it has none.
        b: Another.
        points: Number of points on the line, both ends included; 3 or more.
        split: The split that is evaluated. The training split is evaluated by ``validation_step``: every sample once,
            in the order of the data set, with the data's own augmentation, alike at every point.
        recalibrate: Number of training batches, or the batches themselves, that the statistics of batch norms are
            estimated on at every point, the ends too; ignored for a network without. None interpolates the statistics
            like weights, which adds a barrier.
        metric: Name of a logged metric and its better direction; the height is 1 - metric if that is ``"max"``. By
            default the error, 1 - accuracy, if the task's main metric is accuracy or a module without a task logs it
            (``val/accuracy``, ``val_acc`` and the like), else the loss.
        trainer: Arguments of Lightning's Trainer, without its callbacks and loggers.
        seed: Of the training batches' order.

    Returns:
        ``barrier``, ``excess`` and, of errors, ``stable``, as :class:`prune.connectivity.Barrier` has them; ``ends``,
        the heights of a and b; ``alphas`` and ``heights``, from b to a; ``metric``, the name of the metric; ``split``;
        and ``recalibrated``, whether statistics were estimated anew.

    Raises:
        ValueError: If there is no such split or metric, or the states do not fit the network.
    """
    check_namespace(module)
    check_split(module, data, split)
    network, own_trainer, device = network_of(module), module._trainer, module.device
    evaluations: list[_Evaluation] = []
    with same_random_state(), quiet_lightning(True):
        evaluator = make_trainer({**(trainer or {}), **_EVALUATION_ONLY}, (), Path())
        batches = _batches(recalibrate, module, data, seed, evaluator) if batch_norms(network) else None
        run = forward if batches is None else batch_runner(module, evaluator.precision_plugin)
        state = random_state()

        def height(point: Mapping[str, Tensor]) -> float:
            set_random_state(state)
            module.to(evaluator.strategy.root_device)
            load(point)
            rows = (evaluator.test if split == "test" else evaluator.validate)(module, datamodule=data, verbose=False)
            logged = {name: value for row in rows for name, value in row.items()}
            evaluations.append(_evaluation(logged, module, split, metric))
            return evaluations[-1].height

        try:
            with _set_up_once(data, split), temporary_states(network, batches, run) as load:
                line = barrier(height, a, b, points)
        finally:
            module._trainer = own_trainer
            module.to(device)
    return {
        "barrier": line.barrier,
        "excess": line.excess,
        "stable": line.stable if evaluations[0].is_error else None,
        "ends": list(line.ends),
        "alphas": list(line.alphas),
        "heights": list(line.heights),
        "metric": _named(evaluations[0].metric, split),
        "split": split,
        "recalibrated": batches is not None,
    }


def _batches(
    recalibrate: int | Iterable[Any] | None, module: Any, data: Any, seed: int, evaluator: Trainer
) -> Iterable[Any] | None:
    if not isinstance(recalibrate, int):
        return recalibrate
    if recalibrate < 1:
        raise ValueError(f"recalibrate is {recalibrate}: give 1 or more batches, or None to interpolate the statistics")
    return FirstBatches(training_loader(module, data, seed), recalibrate, module, data, evaluator.precision_plugin)


def check_split(module: LightningModule, data: LightningDataModule, split: str) -> None:
    """Refuse a split that cannot be evaluated.

    Raises:
        ValueError: If there is no such split, no data for it, or the module has no step that evaluates it.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: one of {list(SPLITS)}")
    if not is_overridden(f"{split}_dataloader", data, LightningDataModule):
        raise ValueError(f"{type(data).__name__} has no {split}_dataloader: evaluate on another split")
    if not is_overridden(_STEPS[split], module):
        raise ValueError(f"{type(module).__name__} has no {_STEPS[split]}: evaluate on another split")


@contextmanager
def _set_up_once(data: LightningDataModule, split: str) -> Iterator[None]:
    """Inside, ``data`` is set up and returns one loader, so that the Trainer does not set it up anew at every point."""
    data.prepare_data()
    data.setup(_STAGES[split])
    loader = getattr(data, f"{split}_dataloader")()
    loader = _in_order(loader) if split == "train" else loader
    skipped = dict.fromkeys(("prepare_data", "setup", "teardown"), lambda stage=None: None)
    overrides: dict[str, Callable[..., Any]] = {**skipped, f"{_LOADERS[split]}_dataloader": lambda: loader}
    before = {name: vars(data)[name] for name in overrides if name in vars(data)}
    vars(data).update(overrides)  # on the instance, where they hide the class's methods
    try:
        yield
    finally:
        for name in overrides:
            del vars(data)[name]
        vars(data).update(before)


def _in_order(loader: Any) -> Any:
    """``loader`` with every sample once, in the order of its data set, where it is a DataLoader that makes batches."""
    if type(loader) is not DataLoader or loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return loader
    options = {name: getattr(loader, name) for name in ("collate_fn", "num_workers", "pin_memory", "worker_init_fn")}
    return DataLoader(loader.dataset, loader.batch_size, **options)


def _named(metric: str, split: str) -> str:
    """A metric's name on ``split``: on training data ``validation_step`` logs it as one of validation."""
    return f"{split}{metric.removeprefix('val')}" if split == "train" and metric.startswith("val") else metric


def _evaluation(
    logged: Mapping[str, float], module: nn.Module, split: str, metric: tuple[str, str] | None
) -> _Evaluation:
    task, prefix = getattr(module, "task", None), _LOADERS[split]
    words = ("loss",) if isinstance(task, Task) and task.monitor[0] != "accuracy" else ("accuracy", "acc", "loss")
    tried = [(f"{prefix}{mark}{word}", "min" if word == "loss" else "max") for word in words for mark in "/_"]
    for name, better in tried if metric is None else [metric]:
        if name in logged:
            value = float(logged[name])
            return _Evaluation(name, better == "max", 1 - value if better == "max" else value)
    raise ValueError(
        f"{type(module).__name__} logged {some(sorted(logged)) if logged else 'nothing'} on the {split} split, not "
        f"{' or '.join(name for name, _ in tried) if metric is None else metric[0]}: give metric=(name, 'min' or 'max')"
    )
