"""Iterative pruning with rewinding inside one ``Trainer.train()``."""

from functools import partial
from typing import Any, Literal, cast, final

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from prune.hf.base import Driving, updates_per_epoch
from prune.policies.iterative import REWINDS, Levels
from prune.pruner import Pruner
from prune.rewinding.snapshot import Snapshot
from workbench.duration import Duration

_NEVER = ("random state", "data order", "counters")


@final
class LotteryTicket(Driving):
    """Hunts a lottery ticket in one ``Trainer.train()``: trains, prunes, rewinds and trains again.

    ::

        Trainer(model, args, ..., callbacks=[LotteryTicket(levels=4, rate=0.3, rewind="100it")]).train()

    The Trainer's budget, ``max_steps`` or ``num_train_epochs``, is that of all levels, for a Trainer cannot train
    longer than it was told: of T updates, each of n + 1 levels has S = (T + n k) / (n + 1), of which those after
    level 0 leave out the first k, done before the rewind point. The Trainer's learning-rate schedule is that of one
    level, of S updates, and starts again with each; a scheduler of one's own is rewound too, and has to be made for S
    updates. Before the first update after a level has ended, so that the Trainer has evaluated and saved it, the
    model is pruned to the next density, nested in the last masks, and goes back to the rewind point, where nothing
    was pruned: weights, buffers, optimizer, schedule and gradient scaler.

    What does not go back: the Trainer's counters, the order of the data, which goes on, and the random state. The
    best model is the best of the last level; a callback that stops training ends the hunt.

    The point is kept in memory, on the CPU, and is part of the optimizer's state in checkpoints: what is resumed goes
    on as if undisturbed. A second ``train()`` of the network that was found trains on under the last masks; any other
    starts a hunt anew.

    Args:
        levels: How many times to prune, n. Or give ``density``.
        rate: Share of the remaining weights pruned at each level, in [0, 1); 0 for the control that prunes nothing.
        density: Share of the prunable weights to reach, in (0, 1]; gives the number of levels.
        rewind: Where each level after 0 starts: "0it" at the initial weights, "500it" after k = 500 updates, "2ep"
            after two epochs.
        pruner: Which weights go; the smallest of the whole model by default.
        rewinds: ``"all"``; ``"weights"``, with the learning rate staying where the level ended; ``"learning_rate"``,
            all but weights and buffers; or ``"nothing"`` of the two: fine-tuning at the last learning rate.

    Raises:
        ValueError: If an argument is out of range; when training starts, if S is no whole number, or not above k, or
            FSDP shards the model.

    Warns:
        UserWarning: By name, if a layer collapses; when training ends, if levels are left.

    Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
    arXiv:1912.05671, algorithm 2; Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning", 2020,
    arXiv:2003.02389.
    """

    policy: Levels

    def __init__(
        self,
        levels: int | None = None,
        rate: float = 0.2,
        density: float | None = None,
        rewind: str | Duration = "1ep",
        pruner: Pruner | None = None,
        rewinds: Literal["all", "weights", "learning_rate", "nothing"] = "all",
    ) -> None:
        super().__init__(Levels(levels, rate, density, rewind, pruner), over=self._close)
        if rewinds not in REWINDS:
            raise ValueError(f"rewinds is {rewinds!r}: one of {list(REWINDS)}")
        self.rewinds = rewinds
        self._length = self._point = 0

    @property
    def levels(self) -> list[dict[str, Any]]:
        """A row for every level that has ended: those of :class:`prune.policies.iterative.Levels`, ``steps``, the
        level's updates at its end, and what was ``rewound`` and ``kept`` when it began.
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
            policy.descend(lambda: self._rewind(kwargs["model"], parts))

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
            self.policy.note({n: value for n, value in (metrics or {}).items() if isinstance(value, int | float)})

    def _end(self) -> int:
        """Updates of all levels up to the end of this one."""
        return self._length + self.policy.level * (self._length - self._point)

    def _close(self, state: TrainerState) -> None:
        policy = self.policy
        if policy.finished or state.global_step != self._end() or policy.point is None:
            return
        what = policy.point.what if policy.level else ()
        chosen = REWINDS[self.rewinds]
        rewound, kept = [p for p in what if p in chosen], [p for p in what if p not in chosen]
        policy.close(steps=self._length, rewound=rewound, kept=[*kept, *(_NEVER if policy.level else ())])

    def _rewind(self, model: nn.Module, given: dict[str, Any]) -> None:
        point = self.policy.point
        assert point is not None, "taken"
        parts = [part for part in point.what if part in REWINDS[self.rewinds]]
        point.restore(model, **{name: value for name, value in given.items() if name in parts}, parts=parts)


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
    theirs, ours = (_lambda(args, scheduler.optimizer.defaults["lr"], steps) for steps in (total, length))
    for index, each in enumerate(scheduler.lr_lambdas):
        if _alike(each, theirs):
            scheduler.lr_lambdas[index] = partial(_until, ours, length)
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
