"""A policy driven by the events of a transformers Trainer; what its callbacks share."""

import math
import warnings
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prune.criteria import Criterion
from prune.masks import Masks
from prune.masks.enforce import Handle, unwrapped
from prune.policies import Moment, Policy
from prune.policies.ownership import scaled_back
from workbench.randomness import same_random_state

FILE = "masks.safetensors"
_KEY = "pruning"


class Driving(TrainerCallback, ABC):
    """Tells a policy what a Trainer does; the subclass says which policy.

    Gradients of pruned weights are zeroed at the end of the backward pass that completes an update, for the Trainer
    clips before its callbacks hear of it. What the policy remembers travels in the optimizer's state, because a
    callback is not told which checkpoint is resumed; the masks are also put into every checkpoint, in
    ``masks.safetensors``, for whoever wants to read them.

    Args:
        policy: What decides.
        log: Whether to put the densities beside the loss.
        batches: How many training batches a criterion looks at that looks at data, in the order of the data set; the
            loss is the model's own.
        over: What to do when training has ended, with the hooks still on.
    """

    def __init__(
        self,
        policy: Policy,
        log: bool = True,
        batches: int = 16,
        over: Callable[[TrainerState], None] | None = None,
    ) -> None:
        self.policy, self._log, self._batches, self._over = policy, log, batches, over
        self._handle: Handle | None = None
        self._wrapped: Any = None
        self._moment = Moment(0, 0.0)
        self._armed = False
        self._seen: Masks | None = None

    @property
    @final
    def masks(self) -> Masks | None:
        """Those in force, or None. They stay after training."""
        return self.policy.masks

    @final
    def release(self) -> None:
        """Take every hook off; training does it when it ends, and cannot where it ends by an exception."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.policy.detach()

    @final
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After weights and optimizer have been restored: take up the policy of the checkpoint, or start anew."""
        self.release()
        model, wrapped = kwargs["model"], kwargs["optimizer"]
        if args.deepspeed:
            raise ValueError("DeepSpeed keeps weights of its own, which no mask reaches: train with DDP or FSDP2")
        optimizer = unwrapped(wrapped)
        self._restore(optimizer, state)
        self._wrapped, self._moment, self._armed = wrapped, _moment(state), False
        hooks = [optimizer.register_state_dict_post_hook(self._remember)]
        hooks += [p.register_post_accumulate_grad_hook(self._arm) for p in model.parameters() if p.requires_grad]
        self._handle = Handle([hook.remove for hook in hooks])
        try:
            evidence = _evidence(args, kwargs["train_dataloader"], self._batches)
            self.policy.attach(model, optimizer, self._moment, evidence=evidence)
            self.policy.check_budget(state.max_steps, _epochs(args, kwargs["train_dataloader"]))
        except BaseException:
            self.release()
            raise
        self._seen = self.masks

    @final
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the policy. A model that was the best until now was so among denser ones: that is forgotten."""
        self._moment = _moment(state)
        self.policy.after_step(self._moment)
        before, now = self._seen, self.masks
        if now is not before and now is not None and (before is None or now.density < before.density):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._seen = now

    @final
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the densities beside the loss."""
        if self._log and logs is not None and "loss" in logs:
            densities = self.policy.densities()
            logs.update(densities)
            state.log_history[-1].update(densities)

    @final
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the masks into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.masks is not None and args.should_save and folder.is_dir():
            self.masks.save(folder / FILE)

    @final
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind; say what was not reached; hold the masks of the best model where that was loaded."""
        if self._over is not None:
            self._over(state)
        self.release()
        if (unmet := self.policy.unmet()) is not None and state.is_world_process_zero:
            warnings.warn(f"training ended with {unmet}", stacklevel=2)
        best, masks = state.best_model_checkpoint, self.masks
        if args.load_best_model_at_end and best and masks is not None and not masks.obeyed_by(kwargs["model"]):
            self.policy.masks = Masks.load(Path(best) / FILE)

    def _restore(self, optimizer: Optimizer, state: TrainerState) -> None:
        """Take up what ``_remember`` put into the optimizer's state, if a checkpoint with it is resumed."""
        kind = type(self).__name__
        held: dict[str, list[Any]] = optimizer.param_groups[0].get(_KEY, {})
        kinds: list[str] = cast("Any", state.stateful_callbacks).setdefault(_KEY, [])
        if entries := held.get(kind):
            entry = entries.pop(0)
            if entry["step"] != state.global_step:
                raise ValueError(
                    f"the checkpoint is of step {state.global_step}, its {kind} of step {entry['step']}: between them "
                    f"it was trained without {kind}; resume one that was not"
                )
            self.policy.load_state_dict(entry["policy"])
        elif kind in kinds:
            raise ValueError(
                f"the checkpoint was trained with {kind}, but has no state of its optimizer, in which that of {kind} "
                "would be: resume one that was saved without save_only_model, or start anew from its weights with "
                f"KeepMasked(Masks.load('<checkpoint>/{FILE}'))"
            )
        if not any(held.values()):
            optimizer.param_groups[0].pop(_KEY, None)
        if kind not in kinds:
            kinds.append(kind)

    def _remember(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        entry = {"step": self._moment.step, "policy": self.policy.state_dict()}
        state_dict["param_groups"][0].setdefault(_KEY, {}).setdefault(type(self).__name__, []).append(entry)

    def _arm(self, parameter: Any) -> None:
        """A gradient has come. When all have, and ranks have averaged them, look."""
        if not self._armed:
            self._armed = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._gradients_are_there))  # behind what data parallelism queues while they come

    def _gradients_are_there(self) -> None:
        self._armed = False
        gradients = getattr(self._wrapped, "gradient_state", None)
        if gradients is None or gradients.sync_gradients:
            with _unscaled(self._wrapped, self.policy.reads_gradients):
                self.policy.before_step(self._moment)


def _evidence(args: TrainingArguments, loader: Any, batches: int) -> Callable[[Criterion], dict[str, Any]]:
    """What a criterion that looks at data is shown: batches drawn anew, for those under way belong to their epoch."""

    def shown(criterion: Criterion) -> dict[str, Any]:
        if not criterion.needs_loader:
            return {}
        plain = DataLoader(loader.dataset, args.train_batch_size, collate_fn=loader.collate_fn)
        seen = {"loader": _First(plain, batches, args.seed)}
        return {**seen, "loss": _loss} if criterion.needs_loss else seen

    return shown


class _First:
    """The first batches of a loader, from a random state of their own, anew at every reading."""

    def __init__(self, loader: DataLoader, batches: int, seed: int) -> None:
        self.loader, self.batches, self.seed = loader, batches, seed

    def __iter__(self) -> Iterator[Any]:
        with same_random_state(self.seed):
            seen = list(islice(self.loader, self.batches))
        yield from seen


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's own."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} gives no loss for {list(batch)}, and that of a Trainer is not known here: prune "
            "once before, with Pruner(...)(model, density, loader=..., loss=...), and train with KeepMasked(masks)"
        )
    return loss


def _moment(state: TrainerState) -> Moment:
    return Moment(state.global_step, state.epoch or 0.0)


def updates_per_epoch(args: TrainingArguments, loader: Any) -> int | None:
    """As the Trainer counts them; None if the data has no length."""
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def _epochs(args: TrainingArguments, loader: Any) -> float:
    """Epochs that there will be; infinity if nobody knows."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    per_epoch = updates_per_epoch(args, loader)
    return math.inf if per_epoch is None else args.max_steps / per_epoch


@contextmanager
def _unscaled(optimizer: Any, wanted: bool) -> Iterator[None]:
    """Inside, gradients are as they would be without the gradient scaler of half precision, if that is ``wanted``."""
    scaler = getattr(optimizer, "scaler", None)
    if not wanted or scaler is None or not scaler.is_enabled():
        yield
        return
    with scaled_back(scaler, [optimizer]):
        yield
