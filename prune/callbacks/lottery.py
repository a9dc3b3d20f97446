"""Iterative pruning with rewinding inside one ``fit``."""

import warnings
from typing import Any, final

import torch
from torch import Tensor

from prune.callbacks.base import PolicyCallback
from prune.callbacks.loop_rewind import LoopRewind
from prune.policies.iterative import Iterative
from prune.policies.signature import takes_arguments_of
from prune.rewinding.snapshot import Snapshot
from workbench.training.resume import ResumeState

_OTHERS = ("counters", "random state", "other callbacks", "data order")
_UNSUITED = {
    "Timer": "max_time is that of the whole fit, and would end every level after the first at once: give max_epochs or "
    "max_steps",
    "WeightAveraging": "the average would go on over all levels: average in a fit of its own, under KeepMasked",
    "EMAWeightAveraging": "the average would go on over all levels: average in a fit of its own, under KeepMasked",
    "StochasticWeightAveraging": "it replaces schedulers and weights: average in a fit of its own, under KeepMasked",
}


@final
class LotteryTicket(PolicyCallback):
    """Hunts a lottery ticket inside one ``fit`` of your own training: trains, prunes, rewinds and trains again.

    It drives a :class:`prune.policies.Iterative`, which describes the arguments.

    ``max_epochs`` or ``max_steps`` is the budget of one level; a request to stop (EarlyStopping) ends the level, not
    the hunt. At its end the network is pruned to the next density, nested in the last masks, and goes back to the
    rewind point, where nothing was pruned yet: the state after so many optimizer updates, as ``trainer.global_step``
    counts them. All that a checkpoint holds goes back: weights, buffers, optimizers, schedulers, gradient scaler, the
    loops' counters, the place in the data, and the state of other callbacks, so that each level has its own patience
    and its own best checkpoints. So does the random state. On the CPU a level at rate 0 repeats level 0 bit for bit.

    These do not go back: attributes of the module that are neither parameters nor buffers; the position of a loader
    that keeps its own state (a warning says so); random numbers of loader workers that persist over epochs; and the
    step that loggers count, which grows over the levels. If the rewind point lies inside an epoch, the training means
    of that epoch cover only the part after the point.

    With another ``Rewind.mode`` only part of it goes back: see the table in :mod:`prune.rewinding.modes`. In
    fine-tuning nothing does: a level trains on from the end of level 0 for as many updates as others train from the
    rewind point, with ``fit_loop.max_epochs`` and ``max_steps`` raised meanwhile. Only other callbacks start each level
    with what they knew at the rewind point.

    Logged per epoch: ``level``, ``density`` and ``density/<parameter>``;
    ``ModelCheckpoint(filename="{level:.0f}-{step}")`` keeps the levels apart. The point is kept in memory, on the CPU,
    and is part of the trainer's checkpoints: what is stopped in the middle of a level and resumed with ``ckpt_path``
    goes on there. As Lightning leaves random state out of its checkpoints, resume with
    ``workbench.training.resume.ResumeState`` for the same bits.

    A second ``fit`` of the network that was found trains on under the last masks; any other starts a hunt anew.

    Raises:
        ValueError: Besides those of the policy, when training starts, for strategies that shard the network, loaders
            that are made anew, and callbacks that average weights or limit the time; in training, if the rewind point
            lies inside an epoch of data that cannot be brought there again.

    Warns:
        UserWarning: Besides those of the policy, if the order of the data cannot be rewound.
    """

    policy: Iterative
    stops_levels = True

    @takes_arguments_of(Iterative)
    def __init__(self, policy: Iterative) -> None:
        super().__init__(policy)
        self._loops: LoopRewind | None = None
        self._owed, self._logged = False, (-1, -1)
        self._limits: tuple[int | None, int] = (None, -1)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """A row for every level that has ended: that of :class:`prune.policies.Iterative`, ``stopped``, whether a
        request to stop ended it, and what was ``rewound`` and ``kept`` when it began.
        """
        return self.policy.rows

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hang the levels on the loop that is about to run."""
        _check(trainer)
        loop = trainer.fit_loop
        vars(loop).pop("run", None)  # of a fit that failed before it ran
        run, self._limits = loop.run, (loop.max_epochs, loop.epoch_loop.max_steps)
        if self.policy.resumed and self.policy.fine_tunes:  # before Lightning checks that a checkpoint is within limits
            self._set_limits(trainer, self.policy.position["limits"])

        def levels() -> None:
            del loop.run
            self._loops, self._logged = LoopRewind(trainer, self), (-1, -1)
            try:
                with self._loops.listening():
                    self._resume(trainer)
                    run()
            finally:
                self._loops = None
                self._set_limits(trainer, self._limits)

        loop.run = levels

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log the level, once an epoch."""
        if self._logged != (now := (self.policy.level, trainer.current_epoch)):
            self._logged = now
            level = float(self.policy.level)
            pl_module.log("level", level, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what is not known any more when the checkpoint of an epoch's end is resumed."""
        epoch = trainer.fit_loop.epoch_progress.current
        if epoch.processed == epoch.ready:
            state = checkpoint["callbacks"][self.state_key]
            state["epoch_metrics"] = self._scores(trainer)
            state["stopped"] = bool(trainer.should_stop and trainer.fit_loop._can_stop_early)

    # Called by the loops

    def before_epoch(self, trainer: Any) -> None:
        """End the level that a checkpoint was taken at the end of; take a point that is here."""
        policy, at = self.policy, self.policy.rewind
        if self._owed:
            self._owed = False
            self._turn(trainer)
        if policy.point is not None:
            return
        if self._due(trainer) or (trainer.fast_dev_run and trainer.global_step == 0):
            if not trainer.fit_loop.restarted_mid_epoch:
                self._take(trainer, inside_epoch=False)
        elif trainer.global_step > at.value if at.unit == "it" else trainer.current_epoch > at.value:
            raise ValueError(f"training goes on at step {trainer.global_step}, after the rewind point {at}: start anew")

    def after_batch(self, trainer: Any) -> None:
        """Take a point that lies inside an epoch."""
        at = self.policy.rewind
        if self.policy.point is None and at.unit == "it":
            if trainer.global_step > at.value:
                raise ValueError(
                    f"rewind is {at}, but training went past step {at.value} inside a batch and is at step "
                    f"{trainer.global_step}: give a step between two batches, each step of each optimizer counted"
                )
            if trainer.global_step == at.value:
                self._take(trainer, inside_epoch=True)

    def after_epoch(self, trainer: Any) -> None:
        """Take a point that lies at the end of an epoch; end the level if training would end here."""
        policy = self.policy
        if policy.finished:
            return
        policy.record_metrics(self._scores(trainer))
        if trainer.fit_loop.done:
            self._turn(trainer)
        elif policy.point is None and self._due(trainer):
            self._take(trainer, inside_epoch=False)

    def steps_schedulers(self) -> bool:
        """Whether learning rates follow their schedulers, rather than stay where level 0 left them."""
        return not self.policy.fine_tunes

    # What it does

    def _resume(self, trainer: Any) -> None:
        """A checkpoint of a level's end is no end of training: go back, and prune once everything is in place."""
        loop, policy = trainer.fit_loop, self.policy
        loop.setup_data()
        if not policy.resumed or policy.finished or not (policy.stopped or loop.done):
            return
        if policy.level == len(policy.targets) - 1:
            trainer.should_stop = policy.stopped
            self._turn(trainer)
        elif policy.point is not None and policy.starts_at_end and policy.level == 0:
            self._owed = True  # training is where the next level starts
            self._set_limits(trainer, self._limits_from_here(trainer))
        elif policy.point is not None:
            self._owed = True
            self._rewinder().restore(policy.position)
            for callback in trainer.callbacks:
                if isinstance(callback, ResumeState):
                    callback.discard()

    def _due(self, trainer: Any) -> bool:
        at = self.policy.rewind
        return at.value == (trainer.global_step if at.unit == "it" else trainer.current_epoch)

    def _take(self, trainer: Any, inside_epoch: bool) -> None:
        self.policy.position = {**self._rewinder().position(inside_epoch), "step": trainer.global_step}
        self.policy.point = Snapshot.take(trainer.lightning_module, **self._objects(trainer), rng=False)
        if (obstacle := self._rewinder().data_obstacle()) is not None and trainer.is_global_zero:
            warnings.warn(f"the order of the data is not rewound: {obstacle}", stacklevel=2)

    def _turn(self, trainer: Any) -> None:
        """The level has ended: on to the next, if there is one."""
        policy = self.policy
        rewound, kept = self._record()
        stopped = bool(trainer.should_stop or policy.stopped)
        policy.end_level(stopped=stopped, rewound=rewound, kept=kept)
        if not policy.finished:
            if policy.starts_at_end and policy.level == 0:
                self._take_end(trainer)
            module, objects = trainer.lightning_module, self._objects(trainer)
            policy.start_next_level(module, lambda: self._rewind(trainer), **objects)
            now = {"level": float(policy.level), **policy.densities()}
            trainer._logger_connector._callback_metrics.update({n: torch.tensor(value) for n, value in now.items()})

    def _take_end(self, trainer: Any) -> None:
        """Take the end of level 0 as where levels start; other callbacks keep their state of the rewind point."""
        limits, callbacks = self._limits_from_here(trainer), self.policy.position["callbacks"]
        self._take(trainer, inside_epoch=False)
        self.policy.position |= {"limits": limits, "callbacks": callbacks}

    def _limits_from_here(self, trainer: Any) -> tuple[int | None, int]:
        """``max_epochs`` and ``max_steps`` that give a level from here on as much as from the rewind point."""
        (epochs, steps), at, end = self._limits, self.policy.rewind, trainer.global_step
        if at.unit == "ep" and epochs is not None and steps == -1:
            return trainer.current_epoch + epochs - at.value, -1
        return -1, end + max(end, steps) - self.policy.position["step"]

    @staticmethod
    def _set_limits(trainer: Any, limits: tuple[int | None, int]) -> None:
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = limits

    @staticmethod
    def _objects(trainer: Any) -> dict[str, Any]:
        """What a snapshot is taken of beside the module."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return {"optimizers": trainer.optimizers, "schedulers": schedulers or None, "scaler": scaler}

    def _record(self) -> tuple[list[str], list[str]]:
        """What was rewound when this level began, and what was not."""
        rewound, kept = self.policy.parts(*_OTHERS)
        if "data order" in rewound and self._rewinder().data_obstacle():
            return [name for name in rewound if name != "data order"], [*kept, "data order"]
        return rewound, kept

    def _rewind(self, trainer: Any) -> None:
        trainer.lightning_module.zero_grad()
        self._rewinder().restore(self.policy.position)
        if "limits" in self.policy.position:
            self._set_limits(trainer, self.policy.position["limits"])
        self._step = trainer.global_step

    def _scores(self, trainer: Any) -> dict[str, float]:
        """The metrics that are one number, without those that say which level this is."""
        own, metrics = {"level", *self.policy.densities()}, trainer.callback_metrics
        return {
            n: float(v) for n, v in metrics.items() if n not in own and (not isinstance(v, Tensor) or v.numel() == 1)
        }

    def _rewinder(self) -> LoopRewind:
        assert self._loops is not None, "in a fit"
        return self._loops


def _check(trainer: Any) -> None:
    strategy = type(trainer.strategy)
    if not {"SingleDeviceStrategy", "DDPStrategy"} & {each.__name__ for each in strategy.__mro__}:
        raise ValueError(
            f"{strategy.__name__} shards the network, and the rewind point is kept whole: train on one device or with "
            "strategy ddp"
        )
    for callback in trainer.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _UNSUITED:
                raise ValueError(f"LotteryTicket cannot run beside {kind.__name__}: {_UNSUITED[kind.__name__]}")
    if trainer.reload_dataloaders_every_n_epochs:
        raise ValueError(
            f"reload_dataloaders_every_n_epochs is {trainer.reload_dataloaders_every_n_epochs}, but a level goes "
            "back to the loaders of the one before: set it to 0"
        )
