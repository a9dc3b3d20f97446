"""The barrier between two trainings of a LightningModule, evaluated as its Trainer does."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from prune.connectivity.line import barrier
from prune.connectivity.visiting import batch_norms, visiting
from workbench.messages import some
from workbench.models.forward import forward
from workbench.randomness import random_state, same_random_state, set_random_state
from workbench.tasks import Task
from workbench.training.calibration import FirstBatches, batch_runner
from workbench.training.fit import check_namespace
from workbench.training.loop import make_trainer, quiet_lightning, training_loader
from workbench.training.module import network_of

Split = Literal["val", "test"]
_STEPS = {"val": "validation_step", "test": "test_step"}
_STAGES = {"val": "validate", "test": "test"}
_ALONE: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "callbacks": None,
    "logger": False,
    "enable_progress_bar": False,
    "barebones": False,
}


class _Measured(NamedTuple):
    name: str
    error: bool
    height: float


def between(
    module: LightningModule,
    data: LightningDataModule,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    points: int = 11,
    split: Split = "val",
    refresh: int | Iterable[Any] | None = 16,
    metric: tuple[str, Literal["min", "max"]] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The error barrier on the line between two states of the module's network, for a record.

    One Trainer evaluates all points, on one loader, each from the same random state. Afterwards, also after an
    exception, the network's weights, buffers and modes, the module's trainer, the data module and the random state are
    as they were. Called on every rank.

    Args:
        module: Whose network the states are of.
        data: Its data module.
        a: A state dict of the module's ``network``, or of the module itself if it has none.
        b: Another.
        points: How many, both ends included; 3 or more.
        split: What it is evaluated on.
        refresh: How many training batches the statistics of batch norms are estimated on at every point, the ends too,
            or these batches, as ``training_step`` gets them; nothing is drawn for a network without. None interpolates
            the statistics like weights, which makes a barrier of its own.
        metric: The name of a logged metric and its better direction; the height is 1 - metric if that is ``"max"``. By
            default the error, 1 - accuracy, where the task's main metric is accuracy or a module of your own logs it
            (``val/accuracy``, ``val_acc`` and the like), else the loss.
        trainer: Arguments of Lightning's Trainer, without its callbacks and loggers.
        seed: Of the training batches' order.

    Returns:
        ``barrier``, ``excess`` and, of errors, ``stable``, as :class:`prune.connectivity.Barrier` has them; ``ends``,
        the heights of a and b; ``alphas`` and ``heights``, from b to a; ``metric``, the name of what was measured;
        ``split``; and ``refreshed``, whether statistics were estimated anew.

    Raises:
        ValueError: If there is no such split or metric, or the states do not fit the network.
    """
    check_namespace(module)
    _check(module, data, split)
    network, attached, home = network_of(module), module._trainer, module.device
    seen: list[_Measured] = []
    normed = bool(batch_norms(network))
    with same_random_state(), quiet_lightning(True):
        made = make_trainer({**(trainer or {}), **_ALONE}, (), Path())
        shown = _shown(refresh, module, data, seed, made) if normed else None
        run = forward if shown is None else batch_runner(module, made.precision_plugin)
        state = random_state()

        def height(at: Mapping[str, Tensor]) -> float:
            set_random_state(state)
            module.to(made.strategy.root_device)
            visit(at)
            rows = (made.validate if split == "val" else made.test)(module, datamodule=data, verbose=False)
            seen.append(_measured({name: value for row in rows for name, value in row.items()}, module, split, metric))
            return seen[-1].height

        try:
            with _held(data, split), visiting(network, shown, run) as visit:
                found = barrier(height, a, b, points)
        finally:
            module._trainer = attached
            module.to(home)
    return {
        "barrier": found.barrier,
        "excess": found.excess,
        "stable": found.stable if seen[0].error else None,
        "ends": list(found.ends),
        "alphas": list(found.alphas),
        "heights": list(found.heights),
        "metric": seen[0].name,
        "split": split,
        "refreshed": shown is not None,
    }


def _shown(
    refresh: int | Iterable[Any] | None, module: Any, data: Any, seed: int, made: Trainer
) -> Iterable[Any] | None:
    if not isinstance(refresh, int):
        return refresh
    if refresh < 1:
        raise ValueError(f"refresh is {refresh}: give 1 or more batches, or None to interpolate the statistics")
    return FirstBatches(training_loader(module, data, seed), refresh, module, data, made.precision_plugin)


def _check(module: LightningModule, data: LightningDataModule, split: str) -> None:
    if split not in _STEPS:
        raise ValueError(f"split is {split!r}: one of {list(_STEPS)}")
    if not is_overridden(f"{split}_dataloader", data, LightningDataModule):
        raise ValueError(f"{type(data).__name__} has no {split}_dataloader: evaluate on another split")
    if not is_overridden(_STEPS[split], module):
        raise ValueError(f"{type(module).__name__} has no {_STEPS[split]}: evaluate on another split")


@contextmanager
def _held(data: LightningDataModule, split: str) -> Iterator[None]:
    """Inside, ``data`` is set up once and gives one loader, however often it is asked."""
    data.prepare_data()
    data.setup(_STAGES[split])
    loader = getattr(data, f"{split}_dataloader")()
    nothing = dict.fromkeys(("prepare_data", "setup", "teardown"), lambda stage=None: None)
    put = {**nothing, f"{split}_dataloader": lambda: loader}
    before = {name: vars(data)[name] for name in put if name in vars(data)}
    vars(data).update(put)
    try:
        yield
    finally:
        for name in put:
            del vars(data)[name]
        vars(data).update(before)


def _measured(logged: Mapping[str, float], module: nn.Module, split: str, metric: tuple[str, str] | None) -> _Measured:
    task = getattr(module, "task", None)
    words = ("loss",) if isinstance(task, Task) and task.monitor[0] != "accuracy" else ("accuracy", "acc", "loss")
    tried = [(f"{split}{mark}{word}", "min" if word == "loss" else "max") for word in words for mark in "/_"]
    for name, better in tried if metric is None else [metric]:
        if name in logged:
            value = float(logged[name])
            return _Measured(name, better == "max", 1 - value if better == "max" else value)
    raise ValueError(
        f"{type(module).__name__} logged {some(sorted(logged)) if logged else 'nothing'} on the {split} split, not "
        f"{' or '.join(name for name, _ in tried) if metric is None else metric[0]}: give metric=(name, 'min' or 'max')"
    )
