"""Places in the course of a fit that one can go back to: loops, loaders, random state, what callbacks remember."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from workbench.distributed.ranks import everyone
from workbench.randomness import random_state, set_random_state

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_THEIRS = ("torch.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


class Traveller(Protocol):
    """Who is told how the fit goes on, where Lightning has no hook."""

    def before_epoch(self, trainer: Any) -> None:
        """Nothing of the epoch has happened yet."""
        ...

    def after_batch(self, trainer: Any) -> None:
        """All of a batch has happened, its validation too, and it is not the epoch's last."""
        ...

    def after_epoch(self, trainer: Any) -> None:
        """All of an epoch has happened."""
        ...

    def schedules(self) -> bool:
        """Whether learning rates follow their schedulers."""
        ...


@final
class Course:
    """The loops of one ``fit``, and a way back to a place in them.

    A place is what Lightning's checkpoint has of loops, loaders and callbacks; and the metrics logged so far, and by
    rank the random state and that of the loaders' generators, now and when the batches of the epoch were begun. It is
    taken where nothing is half done. All of it is tensors and plain values.

    Args:
        trainer: Of either Lightning namespace, about to run.
        traveller: A callback. It alone is not taken back.
    """

    def __init__(self, trainer: Any, traveller: Traveller) -> None:
        self._trainer, self._traveller = trainer, traveller
        self._fit, self._epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._begun: dict[str, Any] = {}
        self._fetched = 0
        self._whole = self._between = False
        self._settle: dict[str, Any] | None = None

    @contextmanager
    def travelled(self) -> Iterator[None]:
        """Inside, the loops tell the traveller; afterwards they are as they were."""
        fit, epoch, trainer, traveller = self._fit, self._epoch, self._trainer, self._traveller
        load, start, end, done = (
            fit._load_combined_loader_states,
            fit.on_advance_start,
            fit.on_advance_end,
            fit.on_iteration_done,
        )
        reset, batch_end, schedule = epoch.reset, epoch.on_advance_end, epoch.update_lr_schedulers

        def loaded() -> None:
            load()
            self._begin()  # the loop makes an iterator next

        def started() -> None:
            traveller.before_epoch(trainer)
            if self._settle is not None:  # what ran since the return has drawn numbers
                self._put(self._settle)
                self._settle = None
            start()

        def ended() -> None:
            end()
            self._whole = True

        def iterated() -> None:
            done()
            if self._whole:  # else an exception is on its way
                self._whole = False
                traveller.after_epoch(trainer)

        def begun() -> None:
            if self._between:
                self._between = fit._restarting = False
                return
            if trainer.current_epoch > 0 and not fit.is_resuming and not epoch.restarting:
                self._begin()
            else:  # the iterator is there, but nothing has been fetched
                self._begun["fetching"] = random_state()
            reset()
            self._fetched = epoch.batch_progress.current.ready
            if self._fetched and not epoch._num_ready_batches_reached():
                traveller.after_batch(trainer)  # a checkpoint was taken there

        def batch_ended(fetcher: Any) -> None:
            batch_end(fetcher)
            if not epoch._num_ready_batches_reached():
                traveller.after_batch(trainer)

        def scheduled(*args: Any, **options: Any) -> None:
            if traveller.schedules():
                schedule(*args, **options)

        hung: list[tuple[Any, str, Callable[..., None]]] = [
            (fit, "_load_combined_loader_states", loaded),
            (fit, "on_advance_start", started),
            (fit, "on_advance_end", ended),
            (fit, "on_iteration_done", iterated),
            (epoch, "reset", begun),
            (epoch, "on_advance_end", batch_ended),
            (epoch, "update_lr_schedulers", scheduled),
        ]
        try:
            for loop, name, function in hung:
                setattr(loop, name, function)
            if fit._combined_loader is not None:
                self._begin_anew()
            yield
        finally:
            for loop, name, _ in hung:
                vars(loop).pop(name, None)

    def place(self, between: bool) -> dict[str, Any]:
        """Where the fit is now. Called on every rank.

        Args:
            between: Whether it is between two batches of an epoch, rather than before or after one.

        Raises:
            ValueError: If it is between two batches, and the loaders could not be brought there again.
        """
        if between and (fault := self.fault()):
            raise ValueError(
                f"the rewind point lies inside an epoch, but {fault}: rewind to the end of an epoch ('1ep'), or give a "
                "loader that has state_dict and load_state_dict"
            )
        connector = self._trainer._logger_connector
        others = [each for each in self._trainer.callbacks if each is not self._traveller]
        here = {"random": random_state(), "generators": self._generators(), "begun": dict(self._begun)}
        return {
            "between": between,
            "loops": copy.deepcopy(self._fit.state_dict()),
            "fetched": self._epoch.batch_progress.current.ready - self._fetched if between else 0,
            "metrics": {name: _plain(getattr(connector, name)) for name in _METRICS},
            "callbacks": {c.state_key: copy.deepcopy(state) for c in others if (state := c.state_dict())},
            "ranks": everyone(here),
        }

    def go_to(self, place: dict[str, Any]) -> None:
        """Be there again: the loops go on from it. Called on every rank, before or after an epoch.

        The steps that loggers count go on.
        """
        fit, epoch, trainer = self._fit, self._epoch, self._trainer
        if len(place["ranks"]) != trainer.world_size:
            raise ValueError(
                f"the rewind point is of {len(place['ranks'])} processes, this training has {trainer.world_size}: "
                "resume with as many"
            )
        stepped = epoch._batches_that_stepped
        fit.load_state_dict(copy.deepcopy(place["loops"]))
        epoch._batches_that_stepped = stepped
        for loop in (fit, epoch, epoch.val_loop, epoch.automatic_optimization, epoch.manual_optimization):
            loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
            loop.reset_restart_stage()
        self._between = place["between"]
        if self._between:
            fit._restarting = fit._resuming_from_checkpoint = True
            fit._restart_stage = "restarted_mid_epoch"
        trainer.should_stop = False
        for name, metrics in place["metrics"].items():
            setattr(trainer._logger_connector, name, dict(metrics))
        for callback in trainer.callbacks:
            if callback is not self._traveller and callback.state_key in place["callbacks"]:
                callback.load_state_dict(copy.deepcopy(place["callbacks"][callback.state_key]))
            if hasattr(callback, "_last_global_step_saved"):  # by which ModelCheckpoint knows a step that it saw
                callback._last_global_step_saved = 0
        self._load(place)
        self._settle = place

    def _load(self, place: dict[str, Any]) -> None:
        """Loaders and random state: make the iterator that no loop will make, and fetch what had been fetched."""
        fit, states = self._fit, place["loops"]["state_dict"].get("combined_loader", [])
        fit._combined_loader_states_to_load = []
        fit._combined_loader._load_state_dicts(states)
        if place["between"] or self._trainer.current_epoch == 0:
            for loader in fit._combined_loader.flattened:
                _set_sampler_epoch(loader, fit.epoch_progress.current.processed)
            begun = place["ranks"][self._trainer.global_rank]["begun"]
            self._set(begun)
            fit._combined_loader.reset()  # new workers, which are seeded anew
            iter(fit._data_fetcher)
            if "fetching" in begun:
                set_random_state(begun["fetching"])
            for _ in range(0 if states else place["fetched"]):
                next(fit._data_fetcher)
            fit._data_fetcher.fetched = 0
        self._put(place)

    def fault(self) -> str | None:
        """Why the loaders may not give the same batches again, in words; None if they will."""
        fit = self._fit
        loaders = fit._combined_loader.flattened
        stateful = [hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders]
        if all(stateful):
            return None
        if any(stateful):
            return "some of the loaders have a state and others have none"
        if type(fit._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
            return "training_step fetches its batches itself"
        return next((fault for loader in loaders if (fault := _fault(loader))), None)

    def _begin(self) -> None:
        self._begun = {"random": random_state(), "generators": self._generators()}

    def _begin_anew(self) -> None:
        """Whoever asked how long training is, such as ``configure_optimizers``, had the iterator made before us."""
        fit, here = self._fit, random_state()
        fit._load_combined_loader_states()
        fit._combined_loader.reset()
        iter(fit._data_fetcher)
        set_random_state(here)

    def _put(self, place: dict[str, Any]) -> None:
        self._set(place["ranks"][self._trainer.global_rank])

    def _set(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"])
        for generator, value in zip(self._owned(), state["generators"]):
            generator.set_state(value)

    def _generators(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._owned()]

    def _owned(self) -> list[torch.Generator]:
        """The loaders' own generators, each once."""
        parts = [part for loader in self._fit._combined_loader.flattened for part in _parts(loader)]
        found = [getattr(part, "generator", None) for part in parts]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _parts(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return [part for part in parts if part is not None]


def _fault(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = loader.dataset if isinstance(loader, DataLoader) else loader
        return f"nobody but {type(what).__name__} itself knows which batches it gives next"
    for part in _parts(loader)[1:]:
        if not type(part).__module__.startswith(_THEIRS) and not hasattr(part, "set_epoch"):
            return f"{type(part).__name__} is a sampler that has no set_epoch and may give another order each time"
    return None


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value for name, value in metrics.items()
    }
