"""A LightningModule with its data module and Trainer as what a hunt trains."""

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor

from prune.callbacks import KeepMasked
from prune.callbacks.calibration import calibration
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.lightning import LastUpdate, Return, RewindPoint
from prune.tickets.early_stop import EarlyStop, best_of
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
from workbench.training.module import network_of
from workbench.training.resume import check_checkpoint
from workbench.training.save import save_network

WEIGHTS = "rewind.safetensors"
"""The file of the network's state dict at the rewind point, among a hunt's checkpoints."""


@final
class LightningTrainee(Trainee):
    """Trains a module in Lightning; the moments of level 0 are Lightning's checkpoints: its rewind point, and its end
    where later levels are fine-tuned.

    Weights that a training is to start with are those of the network. What else the module has, a projector of a
    distillation say, is as it was at the moment, and before the first update as the module is now.

    Args:
        module: The module.
        data: Its data module.
        trainer: Arguments of Lightning's Trainer.
        seed: Of level 0.
        rewind: Where the rewind point is.
        folder: Where the moments are kept.
        checkpoint: How often what a stopped training resumes from is written.
        batches: How many training batches a criterion looks at that looks at data.
        early_stop: After how many validations without a better score a training ends; None trains to the end.
        watched: Folder of a training -> callbacks that only look on.
    """

    def __init__(
        self,
        module: LightningModule,
        data: LightningDataModule,
        trainer: Mapping[str, Any] | None,
        seed: int,
        rewind: Duration,
        folder: Path,
        checkpoint: Duration,
        batches: int,
        early_stop: int | None = None,
        watched: Callable[[Path], list[Callback]] = lambda _: [],
    ) -> None:
        apart = {name: value for name, value in (trainer or {}).items() if name not in ("callbacks", "logger")}
        with quiet_lightning(progress.current() is not None):
            init_process_group(make_trainer(apart, (), folder))
        self.module, self.data, self.trainer, self.seed = module, data, trainer, seed
        self.network = network_of(module)
        self.rewind, self.point = rewind, folder / "rewind.ckpt"
        self.checkpoint, self.batches = checkpoint, batches
        self.early_stop, self.watched = early_stop, watched
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
            # What only looks on at a level, and is in its checkpoints, is another one at the next.
            warnings.filterwarnings("ignore", r".*Please add the following callbacks: \['EarlyBird")
            result = train(
                self.module,
                self.data,
                trainer=self._further() if start == self._end else self.trainer,
                seed=arm.seed,
                out=folder,
                checkpoint=self.checkpoint,
                start=start,
                callbacks=[*callbacks, *self.watched(folder)],
                part=part,
            )
        if arm.leaves and not self.point.is_file():
            raise ValueError(f"level 0 was stopped before the rewind point {self.rewind}: rewind to an earlier one")
        if arm.leaves:
            check_checkpoint(self.point, f"move {folder} aside to train it anew")
            self._keep_weights()
        if "end" in arm.leaves:
            self._keep_end(folder)
        del result["masks"]  # level 0 has none, the others the arm's
        result["best"] = best_of(result["history"], 0 if start is None else _counters(start)[0])
        # Beside the history, so that the last level, which nothing follows, has one like the others'.
        far = [row.pop("mask_distance") for row in result["history"] if "mask_distance" in row]
        return {**result, **({"mask_distances": far} if far else {}), **({"stopped": early.ended} if early else {})}

    def _callbacks(self, arm: Arm, start: Path | None) -> tuple[list[Callback], EarlyStop | None]:
        """What makes a plain training that of ``arm``, in order."""
        made: list[Callback] = [] if start is None else [Return(start, arm.start, self.load)]
        made += [LastUpdate()] if "end" in arm.leaves else []
        made += [RewindPoint(self.rewind, self.point)] if arm.leaves else []
        if start == self._end:
            made.append(LastUpdate(held=True))
        if arm.masks is not None:
            made.append(KeepMasked(arm.masks))
        if self.early_stop is None:
            return made, None
        early = EarlyStop(self.early_stop, self.rewind, monitor_of(self.module))
        return [*made, early], early

    def _further(self) -> dict[str, Any]:
        """Arguments of a Trainer that goes on from the end, for as long as one from the rewind point does."""
        given = dict(self.trainer or {})
        begun, _, _ = _counters(self.point)
        ended, epochs, budget = _counters(self._end)
        if self.rewind.unit == "ep" and given.get("max_steps", -1) in (-1, None):
            return {**given, "max_epochs": epochs + given["max_epochs"] - self.rewind.value}
        return {**given, "max_epochs": -1, "max_steps": ended + max(ended, budget) - begun}

    def _keep_end(self, folder: Path) -> None:
        """Keep the checkpoint of the end. What was resumed at its very end has written it as the last of its way."""
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
            found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            with atomic_file(self._weights) as temporary:
                save_file({name: value.contiguous().clone() for name, value in found.items()}, temporary)
        barrier()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Trainee`."""
        load_full_state_dict(self.network, weights)

    def pruned(self, pruner: Pruner, density: float, within: Masks) -> Masks:
        """See :class:`Trainee`."""
        module, data, seed = self.module, self.data, self.seed
        shown = calibration(
            pruner.axes.criterion, module, lambda: training_loader(module, data, seed), self.batches, data
        )
        with same_random_state(seed):
            return pruner(self.network, density, within=within, **shown)

    def save(self, folder: Path, result: dict[str, Any], masks: Masks) -> None:
        """See :class:`Trainee`."""
        save_network(self.module, self.data, folder, result, masks, example=False)

    def points(self) -> dict[str, str]:
        """See :class:`Trainee`."""
        paths = {"point": self.point, "end": self._end, "weights": self._weights}
        return {name: sha256(path) for name, path in paths.items() if path.is_file()}


def _copied(value: Any) -> Any:
    """A copy on the CPU, of all of a tensor."""
    return full_tensor(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def check_criterion(pruner: Pruner, trainer: Mapping[str, Any] | None) -> None:
    """Make sure, before anything is trained, that the pruner can score a network trained so.

    Raises:
        ValueError: If it looks at batches and the weights will be divided among ranks.
    """
    name, strategy = pruner.axes.criterion.name, (trainer or {}).get("strategy")
    if pruner.axes.criterion.needs_loader and isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"criterion {name!r} looks at single batches, and what ModelParallelStrategy divides says nothing of them: "
            "score by magnitude or random, or train with strategy: ddp"
        )


def _counters(path: Path) -> tuple[int, int, int]:
    """Updates and epochs done at a checkpoint, and how many updates were to be done, 0 if nobody knows."""
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return checkpoint["global_step"], epochs, checkpoint.get("last_update", {}).get("budget", 0)
