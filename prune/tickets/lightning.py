"""A hunt's trainee in Lightning."""

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor

from prune.callbacks import KeepMasked
from prune.callbacks.calibration import calibration
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.lightning import LastLearningRate, PartialRestore, RewindPoint
from prune.tickets.early_stop import EarlyStop, best_of
from prune.tickets.subject import Subject
from prune.tickets.trainee import Arm, Trainee
from workbench import progress
from workbench.distributed.ranks import barrier, full_tensor, rank
from workbench.distributed.sharding import load_full_state_dict
from workbench.duration import Duration
from workbench.files import atomic_file, sha256
from workbench.randomness import same_random_state
from workbench.training.loop import (
    init_process_group,
    make_trainer,
    monitor_of,
    quiet_lightning,
    train,
    training_loader,
)
from workbench.training.resume import check_checkpoint
from workbench.training.save import save_network

WEIGHTS = "rewind.safetensors"
"""The file of the network's state dict at the rewind point, among a hunt's checkpoints."""


@final
class LightningTrainee(Trainee):
    """Trains a module in Lightning. Level 0 saves Lightning checkpoints for later levels: its rewind point, and its end
    where later levels are fine-tuned.

    Weights that a training starts with are the network's. Other parts of the module, such as a projector of a
    distillation, are the checkpoint's, and before the first update as the module was given.

    Args:
        subject: The module, its data, Trainer and seed.
        rewind: Where the rewind point is.
        folder: Where its checkpoints are kept.
        checkpoint: How often what a stopped training resumes from is written.
        batches: How many training batches a criterion that needs data is calibrated on.
        early_stop: After how many validations without a better score a training ends; None trains to the end.
        observers: Folder of a training -> callbacks that observe it.
    """

    def __init__(
        self,
        subject: Subject,
        rewind: Duration,
        folder: Path,
        checkpoint: Duration,
        batches: int,
        early_stop: int | None = None,
        observers: Callable[[Path], list[Callback]] = lambda _: [],
    ) -> None:
        module, trainer = subject.module, subject.trainer
        # Ranks have to meet before the module's weights are copied; this Trainer trains nothing.
        bare = {name: value for name, value in trainer.items() if name not in ("callbacks", "logger")}
        with quiet_lightning(progress.current() is not None):
            init_process_group(make_trainer(bare, (), folder))
        self.module, self.data, self.trainer, self.seed = module, subject.data, trainer, subject.seed
        self.network = subject.network
        self.rewind, self.point = rewind, folder / "rewind.ckpt"
        self.checkpoint, self.batches = checkpoint, batches
        self.early_stop, self.observers = early_stop, observers
        self._end, self._weights = folder / "end.ckpt", folder / WEIGHTS
        self._untouched = {name: _copied(value) for name, value in module.state_dict().items()}

    def train(self, arm: Arm, folder: Path, part: tuple[int, int, str], level: int) -> dict[str, Any]:
        """See :class:`Trainee`."""
        start = {"first": None, "point": self.point, "end": self._end}[arm.start.at]
        if start is None:
            load_full_state_dict(self.module, self._untouched)
            if arm.start.weights is not None:
                self.load(arm.start.weights)
        callbacks, early = self._callbacks(arm, start)
        with warnings.catch_warnings():
            # The rewind point has the state of level 0's EarlyBird; every level has one of its own.
            warnings.filterwarnings("ignore", r".*Please add the following callbacks: \['EarlyBird")
            result = train(
                self.module,
                self.data,
                trainer=self._trainer_after_end() if start == self._end else self.trainer,
                seed=arm.seed,
                out=folder,
                checkpoint=self.checkpoint,
                start=start,
                callbacks=[*callbacks, *self.observers(folder)],
                part=part,
            )
        if arm.saves and not self.point.is_file():
            raise ValueError(f"level 0 was stopped before the rewind point {self.rewind}: rewind to an earlier one")
        if arm.saves:
            check_checkpoint(self.point, f"move {folder} aside to train it anew")
            self._keep_weights()
        if "end" in arm.saves:
            self._keep_end(folder)
        del result["masks"]  # level 0 has none, the others the arm's
        result["best"] = best_of(result["history"], 0 if start is None else _counters(start)[0])
        # Beside the history, so that the last level, which nothing follows, has one like the others'.
        distances = [row.pop("mask_distance") for row in result["history"] if "mask_distance" in row]
        return {
            **result,
            **({"mask_distances": distances} if distances else {}),
            **({"stopped": early.ended} if early else {}),
        }

    def _callbacks(self, arm: Arm, start: Path | None) -> tuple[list[Callback], EarlyStop | None]:
        """The callbacks that make a plain training that of ``arm``, in order."""
        callbacks: list[Callback] = [] if start is None else [PartialRestore(start, arm.start, self.load)]
        callbacks += [LastLearningRate()] if "end" in arm.saves else []
        callbacks += [RewindPoint(self.rewind, self.point)] if arm.saves else []
        callbacks += [LastLearningRate(held=True)] if start == self._end else []
        callbacks += [] if arm.masks is None else [KeepMasked(arm.masks)]
        if self.early_stop is None:
            return callbacks, None
        early = EarlyStop(self.early_stop, self.rewind, monitor_of(self.module))
        return [*callbacks, early], early

    def _trainer_after_end(self) -> dict[str, Any]:
        """Arguments of a Trainer that goes on from the end of level 0, for as long as one from the rewind point."""
        trainer = dict(self.trainer)
        point, _, _ = _counters(self.point)
        end, epochs, budget = _counters(self._end)
        if self.rewind.unit == "ep" and trainer.get("max_steps", -1) in (-1, None):
            return {**trainer, "max_epochs": epochs + trainer["max_epochs"] - self.rewind.value}
        return {**trainer, "max_epochs": -1, "max_steps": end + max(end, budget) - point}

    def _keep_end(self, folder: Path) -> None:
        """Keep the checkpoint of the end. A training that was resumed at its very end wrote it as its last one."""
        written = [path for name in ("ended", "last") if (path := folder / "checkpoints" / f"{name}.ckpt").is_file()]
        if rank() == 0:
            with atomic_file(self._end) as temporary:
                shutil.copyfile(written[0], temporary)
        barrier()

    def _keep_weights(self) -> None:
        """Keep the network's weights at the rewind point in a file that other runs may read."""
        if rank() == 0:
            path = next(path for path, each in self.module.named_modules() if each is self.network)
            prefix = f"{path}." if path else ""
            state = torch.load(self.point, map_location="cpu", mmap=True, weights_only=False)["state_dict"]
            weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            with atomic_file(self._weights) as temporary:
                save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary)
        barrier()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Trainee`."""
        load_full_state_dict(self.network, weights)

    def select_masks(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """See :class:`Trainee`."""
        module, data, seed = self.module, self.data, self.seed
        batches = calibration(
            pruner.axes.criterion, module, lambda: training_loader(module, data, seed), self.batches, data
        )
        with same_random_state(seed):
            return pruner(self.network, density, within=within, **batches)

    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """See :class:`Trainee`."""
        save_network(self.module, self.data, folder, result, masks, example=False)

    def point_hashes(self) -> dict[str, str]:
        """See :class:`Trainee`."""
        paths = {"point": self.point, "end": self._end, "weights": self._weights}
        return {name: sha256(path) for name, path in paths.items() if path.is_file()}


def _copied(value: Any) -> Any:
    """A copy on the CPU, of all shards of a tensor."""
    return full_tensor(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def check_criterion(pruner: Pruner, trainer: Mapping[str, Any] | None) -> None:
    """Make sure, before anything is trained, that the pruner can score a network trained so.

    Raises:
        ValueError: If it needs data and the weights will be sharded.
    """
    name, strategy = pruner.axes.criterion.name, (trainer or {}).get("strategy")
    if pruner.axes.criterion.needs_loader and isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"criterion {name!r} needs single batches, which ModelParallelStrategy has not: "
            "score by magnitude or random, or train with strategy: ddp"
        )


def _counters(path: Path) -> tuple[int, int, int]:
    """Updates and epochs done at a checkpoint, and how many updates were planned, 0 if that is unknown."""
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return checkpoint["global_step"], epochs, checkpoint.get("last_update", {}).get("budget", 0)
