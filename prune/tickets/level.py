"""One training of a hunt from the side of the function that trains: where it starts, and its snapshots on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import nn

from prune.masks.enforce import Handle
from prune.masks.stepping import unwrap_optimizer
from prune.rewinding.modes import Groups, groups_of, hold
from prune.rewinding.snapshot import Snapshot, several
from prune.tickets.trainee import Arm
from workbench.distributed.ranks import all_gather, barrier, rank, world_size
from workbench.files import atomic_file
from workbench.randomness import random_state, set_random_state
from workbench.training.order import OrderedLoader, with_epoch_order
from workbench.training.resume import check_checkpoint

_WEIGHTS, _REST = ("weights", "buffers"), ("optimizers", "schedulers", "scaler")


class Checkpoints(NamedTuple):
    """The files of a training's snapshots.

    Args:
        point: The rewind point of level 0.
        end: The end of level 0.
        last: What this training resumes from.
    """

    point: Path
    end: Path
    last: Path


@final
class Level:
    """One training of a hunt: the function calls :meth:`begin` once its optimizers are made, and :meth:`advance` after
    every update, unless :meth:`steps` or :meth:`batches` does that for it.

    Args:
        model: What is trained, in place.
        arm: From where, under which masks.
        number: Of the level.
        rewind: Updates before the rewind point.
        every: Updates between two snapshots to resume from.
        checkpoints: Where they are kept.
        first: The model as it was at the very start.

    Attributes:
        number: Of the level, from 0.
        seed: Of the order of the data, and of generators that the function makes.
        masks: What stays at zero; None for a dense network.
        step: Updates done: 0 where training starts from the first, more after rewinding, or after a stop.
    """

    def __init__(
        self,
        model: nn.Module,
        arm: Arm,
        number: int,
        rewind: int,
        every: int,
        checkpoints: Checkpoints,
        first: Snapshot,
    ) -> None:
        self.number, self.seed, self.masks = number, arm.seed, arm.masks
        self._model, self._start, self._checkpoints = model, arm.start, checkpoints
        self._rewind, self._every, self._first = rewind, every, first
        self._saves = arm.saves
        self._resumed = checkpoints.last.is_file()
        source = {"first": None, "point": checkpoints.point, "end": checkpoints.end}[arm.start.at]
        source = checkpoints.last if self._resumed else source
        self._content: dict[str, Any] = {} if source is None else _read(source)
        self.step: int = self._content.get("step", 0)
        self._first_step: int = self._content.get("first_step", 0) if self._resumed else self.step
        self._groups: dict[int, Groups] = self._content.get("groups", {})
        self._objects: dict[str, list[Any]] = {}
        self._hooks = Handle([])
        self._restore_weights()

    def begin(self, optimizers: Any, schedulers: Any = None, scaler: Any = None) -> None:
        """Load weights, optimizers, schedulers and random state that this training starts with, or had when stopped.

        From here on pruned weights are zero after every step of the optimizers.

        Args:
            optimizers: One, or several: all that step the model.
            schedulers: One learning-rate scheduler, or several. In fine-tuning they stand still.
            scaler: A ``torch.amp.GradScaler``.

        Raises:
            ValueError: If it has been called already, or these are others than before.
        """
        if self._objects:
            raise ValueError("level.begin was called before: call it once, when optimizers and schedulers are made")
        given = {"optimizers": optimizers, "schedulers": schedulers, "scaler": scaler}
        self._objects = {name: several(value) for name, value in given.items() if value is not None}
        self._restore_weights()
        if self._content:
            self._restore_rest(scaler)
        if self.masks is not None:
            for optimizer in self._objects["optimizers"] if not self._resumed else ():
                self.masks.clear_state(optimizer, self._model)
        self._hook()
        self._content = {}
        if self._saves and self.step == self._rewind == 0:
            self._save(self._checkpoints.point)

    def advance(self) -> None:
        """An update has been done.

        Raises:
            ValueError: If the training has not begun.
        """
        if not self._objects:
            raise ValueError("the level has not begun: call level.begin(optimizer) before the loop")
        self.step += 1
        if self._saves and self.step == self._rewind:
            self._save(self._checkpoints.point)
        if self.step % self._every == 0:
            self._save(self._checkpoints.last)

    def until(self, total: int) -> int:
        """The step at which a training of ``total`` updates ends: later in fine-tuning, which goes on after its end."""
        return total if self._start.at != "end" else self._first_step + total - self._rewind

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the updates that are left of ``total``, each counted when the loop comes back for more.

        A loop that is left by ``break`` has its last update not counted.
        """
        while self.step < self.until(total):
            yield self.step
            self.advance()

    def batches(self, loader: Any, total: int) -> Iterator[Any]:
        """The batches that are left of ``total`` updates of one batch each, counted as by :meth:`steps`.

        Their order is a function of the level's seed and the epoch, divided over ranks: what was stopped goes on with
        the batches that it had not seen.

        Args:
            loader: A DataLoader of a data set with a length, shuffled or not.
            total: Updates in a training from the first.

        Raises:
            ValueError: If the loader has a sampler of its own, or no batch.
        """
        batches = with_epoch_order(loader, self.seed, rank(), world_size())
        if not isinstance(batches, OrderedLoader) or not len(batches):
            raise ValueError(
                "the order of this loader cannot be repeated: give a DataLoader with batch_size and shuffle over a "
                "data set with a length, or use level.steps and an order of your own that follows from level.seed"
            )
        running: Iterator[Any] | None = None
        for step in self.steps(total):
            epoch, seen = divmod(step, len(batches))
            if running is None or seen == 0:
                batches.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr] - an EpochOrder
                batches.load_state_dict({"epoch": epoch, "seen": seen})
                running = iter(batches)
            yield next(running)

    # What the hunt calls

    def release(self) -> None:
        """Leave no hook behind."""
        self._hooks.remove()

    def finish(self) -> tuple[int, int]:
        """The function has returned: updates done at its beginning and at its end.

        Raises:
            ValueError: If it made no update, level 0 none after the rewind point, or pruned weights moved.
        """
        if not self._objects or self.step == self._first_step:
            raise ValueError(
                f"the function made no update at level {self.number}, which begins at step {self._first_step}: call "
                "level.begin(optimizer), and loop over level.steps(N), level.batches(loader, N) or "
                "range(level.step, level.until(N)) with level.advance() after every update"
            )
        if self._saves and self.step <= self._rewind:
            raise ValueError(
                f"rewind is {self._rewind}it, but the function made {self.step} updates only: rewind to an earlier step"
            )
        if self.masks is not None and not self.masks.is_applied_to(self._model):
            raise ValueError("pruned weights moved: give level.begin all optimizers that step the model")
        if "end" in self._saves:
            self._save(self._checkpoints.end)
        return self._first_step, self.step

    def _restore_weights(self) -> None:
        """Load the weights that this training goes on from, under its masks."""
        if self._start.weights is None or self._resumed:
            self._snapshot().restore(self._model, parts=_WEIGHTS)
        else:
            self._first.restore(self._model, parts=_WEIGHTS)  # buffers that are in no state dict
            self._model.load_state_dict(self._start.weights)
        if self.masks is not None:
            self.masks.apply(self._model)

    def _restore_rest(self, scaler: Any) -> None:
        """Load optimizers, schedulers and random state, as far as the start says."""
        snapshot = self._snapshot()
        parts = [
            name for name in snapshot.what if name in _REST and not (name == "schedulers" and self._start.at == "end")
        ]
        given = {name: self._objects.get(name) for name in ("optimizers", "schedulers") if name in parts}
        snapshot.restore(self._model, **given, scaler=scaler if "scaler" in parts else None, parts=parts)
        for optimizer in self._objects["optimizers"] if not (self._start.optimizer or self._resumed) else ():
            unwrap_optimizer(optimizer).state.clear()
        random = self._content["random"]
        if (self._start.random or self._resumed) and len(random) == world_size():
            set_random_state(random[rank()])

    def _hook(self) -> None:
        """Keep pruned weights at zero; record the groups of level 0's steps, or in fine-tuning hold its last ones."""
        optimizers, removers = self._objects["optimizers"], []
        for index, optimizer in enumerate(optimizers):

            def record_groups(optimizer: Any, *_: Any, index: int = index) -> None:
                self._groups[index] = groups_of(optimizer)

            def hold_groups(optimizer: Any, *_: Any, index: int = index) -> None:
                if index in self._groups:  # else it never stepped
                    hold(optimizer, self._groups[index])

            if self._start.at == "end":
                hold_groups(unwrap_optimizer(optimizer))
            if self._start.at == "end" or "end" in self._saves:
                hook = hold_groups if self._start.at == "end" else record_groups
                removers.append(unwrap_optimizer(optimizer).register_step_pre_hook(hook).remove)
        if self._start.at == "end":
            for scheduler in self._objects.get("schedulers", ()):
                scheduler.step = lambda *_, **__: None
                removers.append(lambda scheduler=scheduler: vars(scheduler).pop("step", None))
        if self.masks is not None:
            removers.append(self.masks.keep(optimizers, self._model).remove)
        self._hooks = Handle(removers)

    def _snapshot(self) -> Snapshot:
        if not self._content:
            return self._first
        snapshot = Snapshot()
        snapshot.load_state_dict(self._content["snapshot"])
        return snapshot

    def _save(self, path: Path) -> None:
        """Write a snapshot of the training as it is now, on rank 0, atomically."""
        # In fine-tuning they stand still.
        schedulers = None if self._start.at == "end" else self._objects.get("schedulers")
        scaler = self._objects["scaler"][0] if "scaler" in self._objects else None
        taken = Snapshot.take(self._model, self._objects["optimizers"], schedulers, scaler, rng=False)
        content = {
            "step": self.step,
            "first_step": self._first_step,
            "snapshot": taken.state_dict(),
            "groups": self._groups,
        }
        content["random"] = all_gather(random_state())
        if rank() == 0:
            with atomic_file(path) as temporary:
                torch.save(content, temporary)
        barrier()


def _read(path: Path) -> dict[str, Any]:
    check_checkpoint(path, "remove it to train this level from where it starts; what is finished is kept")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
