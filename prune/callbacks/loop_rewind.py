"""Go back to an earlier position of a running ``fit``: loops, loaders, random state, and the state of callbacks.

States of a ``fit``, and where a :class:`LoopListener` is called::

    run ──► START OF AN EPOCH ──────► BATCH ──────► BETWEEN BATCHES ──► (next batch)
               before_epoch       ▲     │             after_batch
                    ▲             │     │ last
                    │             │     ▼
                    │             │   END OF AN EPOCH ──► the loop is done: the listener may restore, else run returns
                    │             │     after_epoch
                    │             │     │
                    └─────────────┼─────┘  the next epoch
                    ▲             ▲
                    └─ restore ───┘  called at the start or end of an epoch, to a position at either, or between batches

Invariants:

- A position is taken where nothing is half done: all of a batch or of an epoch has happened, hooks of callbacks and
  validation included. So the listener is called by the loops themselves; Lightning has no hook that late or that early.
- ``restore`` is called outside an epoch; a position between batches is resumed by entering the epoch loop once more
  without its reset, on a new iterator from which the batches before the position have been drawn.
- Random state and the loaders' generators are set twice: at once, so that what runs before the next epoch may read
  them, and again before that epoch (``_pending``), because hooks that ran in between have drawn numbers.
- A position is tensors and plain values alone, for it is part of checkpoints.

Written for lightning and pytorch_lightning 2.6 (checked with 2.6.6). While :meth:`LoopRewind.listening` is active,
seven methods are replaced on the instances of the loops:

==================================================== ==================================================================
``FitLoop._load_combined_loader_states``             the last call before ``setup_data`` makes the first iterator
``FitLoop.on_advance_start``                         the first call of an epoch, before ``on_train_epoch_start``
``FitLoop.on_advance_end``                           returns only if no exception ended the epoch
``FitLoop.on_iteration_done``                        the last call of an epoch, in a ``finally``
``_TrainingEpochLoop.reset``                         the first call of the epoch loop; sets its counters to 0
``_TrainingEpochLoop.on_advance_end``                the last call of a batch, after validation inside an epoch
``_TrainingEpochLoop.update_lr_schedulers``          called for every step and epoch of the schedulers
==================================================== ==================================================================

Private attributes are read or set where a comment says why: of the loops ``_restarting``, ``_restart_stage``,
``_resuming_from_checkpoint``, ``_loaded_from_state_dict``, ``_batches_that_stepped``, ``_num_ready_batches_reached``,
``_combined_loader``, ``_combined_loader_states_to_load``, ``_data_fetcher``; of the Trainer ``_logger_connector``; of
ModelCheckpoint ``_last_global_step_saved``.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from workbench.distributed.ranks import all_gather
from workbench.randomness import random_state, set_random_state

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_KNOWN_SAMPLERS = ("torch.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


class LoopListener(Protocol):
    """A callback that the loops call where Lightning has no hook."""

    def before_epoch(self, trainer: Any) -> None:
        """Nothing of the epoch has happened yet."""
        ...

    def after_batch(self, trainer: Any) -> None:
        """All of a batch has happened, its validation too, and it is not the epoch's last."""
        ...

    def after_epoch(self, trainer: Any) -> None:
        """All of an epoch has happened."""
        ...

    def steps_schedulers(self) -> bool:
        """Whether learning rates follow their schedulers."""
        ...


@final
class LoopRewind:
    """Positions in the loops of one ``fit``, and the way back to them.

    A position is what Lightning's checkpoint has of loops, loaders and callbacks; the metrics logged so far; and, by
    rank, random state and that of the loaders' generators, both now and when the iterator of the epoch was made.

    Args:
        trainer: Of either Lightning namespace, about to run.
        listener: A callback. Only its own state is not restored.
    """

    def __init__(self, trainer: Any, listener: LoopListener) -> None:
        self._trainer, self._listener = trainer, listener
        self._fit, self._epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._iterator_made: dict[str, Any] = {}  # random state when the epoch's iterator was made
        self._resumed_at = 0  # batches of this epoch that a resumed checkpoint had done already
        self._epoch_ended = self._enters_epoch = False
        self._pending: dict[str, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the loops call the listener; afterwards they are as they were."""
        fit, epoch, trainer, listener = self._fit, self._epoch, self._trainer, self._listener
        load_loader_states = fit._load_combined_loader_states
        start_epoch, end_epoch, leave_epoch = fit.on_advance_start, fit.on_advance_end, fit.on_iteration_done
        reset_batches, end_batch, step_schedulers = epoch.reset, epoch.on_advance_end, epoch.update_lr_schedulers

        def before_first_iterator() -> None:
            load_loader_states()
            self._note_iterator()

        def before_epoch() -> None:
            listener.before_epoch(trainer)
            if self._pending is not None:  # hooks that ran since restore() have drawn numbers
                self._set_random_state(self._pending)
                self._pending = None
            start_epoch()

        def at_epoch_end() -> None:
            end_epoch()
            self._epoch_ended = True

        def after_epoch() -> None:
            leave_epoch()
            # It runs in a ``finally``: without this flag an exception would look like the end of an epoch.
            if self._epoch_ended:
                self._epoch_ended = False
                listener.after_epoch(trainer)

        def enter_epoch() -> None:
            if self._enters_epoch:  # restored between batches: the counters are those of the position already
                self._enters_epoch = fit._restarting = False
                return
            if trainer.current_epoch > 0 and not fit.is_resuming and not epoch.restarting:
                self._note_iterator()  # the epoch loop makes one next, on this very condition
            else:  # it was made in setup_data; workers may have started, but nothing has been fetched
                self._iterator_made["first_fetch"] = random_state()
            reset_batches()
            self._resumed_at = epoch.batch_progress.current.ready
            if self._resumed_at and not epoch._num_ready_batches_reached():
                listener.after_batch(trainer)  # the resumed checkpoint was written between two batches

        def after_batch(fetcher: Any) -> None:
            end_batch(fetcher)
            if not epoch._num_ready_batches_reached():
                listener.after_batch(trainer)

        def step_schedulers_or_not(*args: Any, **options: Any) -> None:
            if listener.steps_schedulers():
                step_schedulers(*args, **options)

        replacements: list[tuple[Any, str, Callable[..., None]]] = [
            (fit, "_load_combined_loader_states", before_first_iterator),
            (fit, "on_advance_start", before_epoch),
            (fit, "on_advance_end", at_epoch_end),
            (fit, "on_iteration_done", after_epoch),
            (epoch, "reset", enter_epoch),
            (epoch, "on_advance_end", after_batch),
            (epoch, "update_lr_schedulers", step_schedulers_or_not),
        ]
        try:
            for loop, name, function in replacements:
                setattr(loop, name, function)
            if fit._combined_loader is not None:
                self._make_iterator_again()
            yield
        finally:
            for loop, name, _ in replacements:  # the class's method shows through again
                vars(loop).pop(name, None)

    def position(self, inside_epoch: bool) -> dict[str, Any]:
        """Where the fit is now. Called on every rank.

        Args:
            inside_epoch: Whether it is between two batches of an epoch, rather than before or after one.

        Raises:
            ValueError: If it is inside an epoch whose batches the loaders may not give again.
        """
        if inside_epoch and (obstacle := self.data_obstacle()):
            raise ValueError(
                f"the rewind point is inside an epoch, but {obstacle}: rewind to the end of an epoch ('1ep'), or "
                "give a loader that has state_dict and load_state_dict"
            )
        connector = self._trainer._logger_connector
        others = [callback for callback in self._trainer.callbacks if callback is not self._listener]
        state = {
            "random": random_state(),
            "generators": self._generator_states(),
            "iterator_made": dict(self._iterator_made),
        }
        return {
            "inside_epoch": inside_epoch,
            "loops": copy.deepcopy(self._fit.state_dict()),
            # Where a checkpoint was resumed inside this epoch, Lightning began its data anew.
            "fetched": self._epoch.batch_progress.current.ready - self._resumed_at if inside_epoch else 0,
            # trainer.callback_metrics and its like are computed from these, and have no setter.
            "metrics": {name: _to_cpu(getattr(connector, name)) for name in _METRICS},
            "callbacks": {c.state_key: copy.deepcopy(held) for c in others if (held := c.state_dict())},
            "ranks": all_gather(state),
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Go back: the loops continue from ``position``. Called on every rank, before or after an epoch.

        The step that loggers count goes on.
        """
        fit, epoch, trainer = self._fit, self._epoch, self._trainer
        if len(position["ranks"]) != trainer.world_size:
            raise ValueError(
                f"the rewind point is of {len(position['ranks'])} processes, this training has {trainer.world_size}: "
                "resume with as many"
            )
        logged_steps = epoch._batches_that_stepped  # the loggers' step, which must not repeat
        fit.load_state_dict(copy.deepcopy(position["loops"]))
        epoch._batches_that_stepped = logged_steps
        # load_state_dict marks every loop as restarted from a checkpoint, for which Lightning corrects counters that
        # were written in the middle of a hook. Those of a position need no correction.
        for loop in (fit, epoch, epoch.val_loop, epoch.automatic_optimization, epoch.manual_optimization):
            loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
            loop.reset_restart_stage()
        self._enters_epoch = position["inside_epoch"]
        if self._enters_epoch:
            # So that on_advance_start runs no hook of the epoch's start, and the epoch loop makes no iterator.
            fit._restarting = fit._resuming_from_checkpoint = True
            fit._restart_stage = "restarted_mid_epoch"
        trainer.should_stop = False
        for name, metrics in position["metrics"].items():
            setattr(trainer._logger_connector, name, dict(metrics))
        for callback in trainer.callbacks:
            if callback is not self._listener and callback.state_key in position["callbacks"]:
                callback.load_state_dict(copy.deepcopy(position["callbacks"][callback.state_key]))
            # ModelCheckpoint saves no step twice, and steps come again; the attribute is not part of its state.
            if hasattr(callback, "_last_global_step_saved"):
                callback._last_global_step_saved = 0
        self._restore_data(position)
        self._pending = position

    def _restore_data(self, position: dict[str, Any]) -> None:
        """Loaders and random state. Makes the iterator that no loop will make, and fetches what had been fetched."""
        fit, states = self._fit, position["loops"]["state_dict"].get("combined_loader", [])
        fit._combined_loader_states_to_load = []  # fit.load_state_dict left them here for a restart
        fit._combined_loader._load_state_dicts(states)
        # In later epochs the epoch loop makes the iterator when it starts; that of epoch 0 comes from setup_data.
        if position["inside_epoch"] or self._trainer.current_epoch == 0:
            for loader in fit._combined_loader.flattened:
                _set_sampler_epoch(loader, fit.epoch_progress.current.processed)
            iterator_made = position["ranks"][self._trainer.global_rank]["iterator_made"]
            self._set_states(iterator_made)
            fit._combined_loader.reset()  # new workers, which are seeded anew
            iter(fit._data_fetcher)
            if "first_fetch" in iterator_made:
                set_random_state(iterator_made["first_fetch"])
            for _ in range(0 if states else position["fetched"]):  # a loader with a state of its own is there already
                next(fit._data_fetcher)
            fit._data_fetcher.fetched = 0  # the epoch loop adds the batches done itself
        self._set_random_state(position)

    def data_obstacle(self) -> str | None:
        """Why the loaders may not give the same batches again, in words; None if they will."""
        fit = self._fit
        loaders = fit._combined_loader.flattened
        stateful = [hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders]
        if all(stateful):
            return None
        if any(stateful):
            return "some of the loaders have a state and others have none"
        # Lightning's fetcher for a training_step(self, dataloader_iter); the class is private.
        if type(fit._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
            return "training_step fetches its batches itself"
        return next((obstacle for loader in loaders if (obstacle := _obstacle(loader))), None)

    def _note_iterator(self) -> None:
        self._iterator_made = {"random": random_state(), "generators": self._generator_states()}

    def _make_iterator_again(self) -> None:
        """Make an iterator under known random state in place of one made before ``fit`` ran.

        ``trainer.estimated_stepping_batches``, as ``configure_optimizers`` reads it, calls ``setup_data`` early.
        """
        fit, state = self._fit, random_state()
        fit._load_combined_loader_states()
        fit._combined_loader.reset()
        iter(fit._data_fetcher)
        set_random_state(state)

    def _set_random_state(self, position: dict[str, Any]) -> None:
        self._set_states(position["ranks"][self._trainer.global_rank])

    def _set_states(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"])
        for generator, value in zip(self._generators(), state["generators"]):
            generator.set_state(value)

    def _generator_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _generators(self) -> list[torch.Generator]:
        """The loaders' own generators, each once."""
        parts = [part for loader in self._fit._combined_loader.flattened for part in _parts(loader)]
        generators = [getattr(part, "generator", None) for part in parts]
        return list({id(each): each for each in generators if isinstance(each, torch.Generator)}.values())


def _parts(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return [part for part in parts if part is not None]


def _obstacle(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        source = loader.dataset if isinstance(loader, DataLoader) else loader
        return f"only {type(source).__name__} itself knows which batches it gives next"
    for part in _parts(loader)[1:]:
        if not type(part).__module__.startswith(_KNOWN_SAMPLERS) and not hasattr(part, "set_epoch"):
            return f"{type(part).__name__} is a sampler that has no set_epoch and may give another order each time"
    return None


def _to_cpu(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value for name, value in metrics.items()
    }
