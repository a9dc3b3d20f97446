"""Iterative pruning with rewinding inside one ``Trainer.train()``."""

from functools import partial
from typing import Any, cast, final

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from prune.hf.base import PolicyCallback, updates_per_epoch
from prune.policies.iterative import Iterative
from prune.policies.signature import takes_arguments_of
from prune.rewinding.snapshot import Snapshot

_NEVER = ("random state", "data order", "counters")


@final
class LotteryTicket(PolicyCallback):
    """Hunts a lottery ticket in one ``Trainer.train()``: trains, prunes, rewinds and trains again.

    It drives a :class:`prune.policies.Iterative`, which describes the arguments.

    ::

        Trainer(model, args, ..., callbacks=[LotteryTicket(Levels(4, rate=0.3), rewind="100it")]).train()

    The Trainer's budget, ``max_steps`` or ``num_train_epochs``, is that of all levels, for a Trainer cannot train
    longer than it was told: of T updates, each of n + 1 levels has S = (T + n k) / (n + 1), of which those after
    level 0 leave out the first k, done before the rewind point. The Trainer's learning-rate schedule is that of one
    level, of S updates, and starts again with each; a scheduler of one's own is rewound too, and has to be made for S
    updates. Before the first update after a level has ended, so that the Trainer has evaluated and saved it, the
    model is pruned to the next density, nested in the last masks, and goes back to the rewind point, where nothing
    was pruned: weights, buffers, optimizer, schedule and gradient scaler.

    With another ``Rewind.mode`` only part of that goes back, as :mod:`prune.rewinding.modes` has it in a table. In any
    mode the Trainer's counters, the order of the data and the random state go on, and are not rewound. The
    best model is the best of the last level; a callback that stops training ends the hunt.

    The point is kept in memory, on the CPU, and is part of the optimizer's state in checkpoints: what is resumed goes
    on as if undisturbed. A second ``train()`` of the network that was found trains on under the last masks; any other
    starts a hunt anew.

    Raises:
        ValueError: Besides those of the policy, when training starts, if S is no whole number, or not above k, or FSDP
            shards the model.
    """

    policy: Iterative

    @takes_arguments_of(Iterative)
    def __init__(self, policy: Iterative) -> None:
        super().__init__(policy, at_end=self._close)
        self._length = self._point = 0

    @property
    def levels(self) -> list[dict[str, Any]]:
        """A row for every level that has ended: those of :class:`prune.policies.Iterative`, ``steps``, the level's
        updates at its end, and what was ``rewound`` and ``kept`` when it began.
        """
        return self.policy.rows

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Divide the budget, and give the schedule the length of a level."""
        if self.policy.finished:
            return
        if args.fsdp:
            raise ValueError("FSDP shards the model, and the rewind point is kept whole: train with DDP")
        at, per_epoch = self.policy.rewind, updates_per_epoch(args, kwargs["train_dataloader"])
        if at.unit == "ep" and per_epoch is None:
            raise ValueError(f"rewind is {at}, but the data has no length: give updates, such as '500it'")
        self._point = at.steps(per_epoch or 0)
        self._length = level_length(state.max_steps, len(self.policy.targets) - 1, self._point)
        self.policy.check_budget(self._length, self._length / (per_epoch or self._length))
        schedule_levels(args, kwargs["lr_scheduler"], state.max_steps, self._length)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the point, or end the level, if the updates before this one say so."""
        policy, optimizer = self.policy, kwargs["optimizer"]
        if policy.finished:
            return
        scaler = getattr(optimizer, "scaler", None)
        parts = {"optimizers": optimizer, "schedulers": kwargs["lr_scheduler"], "scaler": scaler}
        if policy.point is None:
            if state.global_step > self._point:
                raise ValueError(
                    f"training goes on at step {state.global_step}, after the rewind point {policy.rewind}: start anew"
                )
            if state.global_step == self._point:
                policy.point = Snapshot.take(kwargs["model"], rng=False, **parts)
        if state.global_step == self._end():
            self._close(state)
            if policy.starts_at_end and policy.level == 0:
                policy.point = Snapshot.take(kwargs["model"], rng=False, **parts)
            policy.start_next_level(kwargs["model"], **parts)
        policy.hold()  # the Trainer has stepped the scheduler

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what the level has come to."""
        if not self.policy.finished:
            self.policy.record_metrics(
                {n: value for n, value in (metrics or {}).items() if isinstance(value, int | float)}
            )

    def _end(self) -> int:
        """Updates of all levels up to the end of this one."""
        return self._length + self.policy.level * (self._length - self._point)

    def _close(self, state: TrainerState) -> None:
        policy = self.policy
        if policy.finished or state.global_step != self._end() or policy.point is None:
            return
        rewound, kept = policy.parts()
        policy.end_level(steps=self._length, rewound=rewound, kept=[*kept, *(_NEVER if policy.level else ())])


def level_length(total: int, prunings: int, point: int) -> int:
    """Updates of a level, S, where S + n (S - k) = T: the first is whole, the others start at the rewind point.

    Args:
        total: T, updates of all levels.
        prunings: n, levels after the first.
        point: k, updates before the rewind point.

    Raises:
        ValueError: If S is no whole number, with totals that give one.
    """
    length, rest = divmod(total + prunings * point, prunings + 1)
    if rest:
        below, above = total - rest, total - rest + prunings + 1
        raise ValueError(
            f"{total} updates are not {prunings + 1} levels of one length that rewind to update {point}: set max_steps "
            f"to {below} for levels of {length} updates, or to {above} for {length + 1}"
        )
    return length


def schedule_levels(args: TrainingArguments, scheduler: Any, total: int, length: int) -> None:
    """Let the schedule that a Trainer makes of its arguments for ``total`` updates end, and stay, after ``length``.

    Any other scheduler is left as it is.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    of_budget, of_level = (_lambda(args, scheduler.optimizer.defaults["lr"], steps) for steps in (total, length))
    for index, each in enumerate(scheduler.lr_lambdas):
        if _alike(each, of_budget):
            scheduler.lr_lambdas[index] = partial(_until, of_level, length)
    if scheduler.last_epoch == 0:
        for group, base, each in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = base * each(0)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _lambda(args: TrainingArguments, rate: float, steps: int) -> Any:
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
    )
    return made.lr_lambdas[0] if isinstance(made, LambdaLR) else None


def _alike(one: Any, other: Any) -> bool:
    both = isinstance(one, partial) and isinstance(other, partial)
    return both and (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)


def _until(schedule: Any, length: int, step: int) -> float:
    return schedule(min(step, length))
