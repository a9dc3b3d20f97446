"""A policy driven by the events of a transformers Trainer.

Events of the Trainer in the order of one run, and the event of :class:`prune.policies.Policy` that each becomes:

============================== ===================================================================================
transformers                   policy
============================== ===================================================================================
``on_train_begin``             ``load_state_dict``, where the optimizer's state of a resumed checkpoint holds one;
                               ``attach``; ``check_budget``
(each parameter's gradient is  nothing; the first one asks autograd to call back when the backward pass is over
accumulated)
(backward pass is over)        ``before_step``, if it completes an update
(gradients are clipped)        the norm counts kept weights only
(the optimizer steps)          a hook on the optimizer multiplies weights by masks
``on_step_end``                ``after_step``
``on_log``                     ``densities``, beside the loss
``on_save``                    ``masks``, to ``masks.safetensors`` in the checkpoint
(``optimizer.state_dict()``)   ``state_dict``, into the optimizer's state
``on_train_end``               ``shortfall``, as a warning; ``detach``
============================== ===================================================================================

What is in brackets is no event of the Trainer, and these are the hooks that take its place:

- The Trainer clips before ``on_pre_optimizer_step``, so gradients are read and zeroed by hooks on the parameters.
- A callback does not learn which checkpoint is resumed, so the policy's state travels in the optimizer's.

Invariant: between ``on_train_begin`` and ``release`` every hook is in ``_handle``; outside there is none.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from prune.hf.calibration import trainer_calibration
from prune.masks import Masks
from prune.masks.enforce import Handle
from prune.masks.stepping import unwrap_optimizer
from prune.policies import Policy, Timestamp
from prune.policies.optimizers import unscaled
from prune.policies.timestamp import START

logger = logging.get_logger(__name__)

FILE = "masks.safetensors"
_KEY = "pruning"


class PolicyCallback(TrainerCallback):
    """Drives a policy by the events of a Trainer.

    Gradients of pruned weights are zeroed at the end of the backward pass that completes an update, before the Trainer
    clips. The state of the policy is part of the optimizer's state in checkpoints; the masks are also written into
    every checkpoint, as ``masks.safetensors``, to be read by others. A criterion that needs data is calibrated on
    batches of the training data, shuffled by the Trainer's seed and divided among processes, and on the model's own
    loss: see :mod:`prune.hf.calibration`.

    A model that is denser than it will be scores better than what it becomes: ``load_best_model_at_end`` takes the
    best at the final density, and the patience of ``EarlyStoppingCallback`` begins there.

    Args:
        policy: What decides.
        log: Whether to log densities beside the loss.
        at_end: Called when training has ended, with the hooks still on.
    """

    def __init__(self, policy: Policy, log: bool = True, at_end: Callable[[TrainerState], None] | None = None) -> None:
        self.policy, self._log, self._at_end = policy, log, at_end
        self._handle: Handle | None = None
        self._optimizer: Any = None
        self._time = START
        self._callback_queued = False
        self._compared: Masks | None = None

    @property
    @final
    def masks(self) -> Masks | None:
        """Those in force, or None. They stay after training."""
        return self.policy.masks

    @final
    def release(self) -> None:
        """Remove every hook. Training does so when it ends; after an exception it cannot, so call this."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.policy.detach()

    @final
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After weights and optimizer have been restored: resume the policy of the checkpoint, or start it."""
        self.release()
        model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        if args.deepspeed:
            raise ValueError("DeepSpeed keeps its own copy of the weights, without masks: train with DDP or FSDP2")
        optimizer = unwrap_optimizer(self._optimizer)
        self._restore(optimizer, state)
        self._time, self._callback_queued = _now(state), False
        hooks = [optimizer.register_state_dict_post_hook(self._store)]
        hooks += [p.register_post_accumulate_grad_hook(self._queue) for p in model.parameters() if p.requires_grad]
        self._handle = Handle([hook.remove for hook in hooks])
        try:
            calibration = trainer_calibration(args, kwargs["train_dataloader"])
            resumed = self.policy.attach(model, optimizer, self._time, calibration=calibration)
            self.policy.check_budget(state.max_steps, _epochs(args, kwargs["train_dataloader"]))
        except BaseException:
            self.release()
            raise
        self._compared = self.masks if resumed else None
        self._compare(state)
        if not self.policy.at_final_density() and args.metric_for_best_model is not None:
            logger.info(
                f"{type(self).__name__}: the best model by {args.metric_for_best_model} is one at the final density"
            )

    @final
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the policy of the update."""
        self._time = _now(state)
        self.policy.after_step(self._time)
        self._compare(state)

    @final
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the densities beside the loss."""
        if self._log and logs is not None and "loss" in logs:
            densities = self.policy.densities()
            # The Trainer has copied logs to the history already; reporters that come later read logs.
            logs.update(densities)
            state.log_history[-1].update(densities)

    @final
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.masks is not None and args.should_save and folder.is_dir():
            self.masks.save(folder / FILE)

    @final
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove every hook; warn of what was not reached; hold the masks of the best model where it was loaded."""
        if self._at_end is not None:
            self._at_end(state)
        self.release()
        best, masks, model = state.best_model_checkpoint, self.masks, kwargs["model"]
        # The Trainer loads the best model before this event.
        if args.load_best_model_at_end and best and masks is not None and not masks.is_applied_to(model):
            self.policy.masks = Masks.load(Path(best) / FILE)
        masked = self.masks is None or self.masks.is_applied_to(model)
        if not state.is_world_process_zero:
            return
        if (shortfall := self.policy.shortfall()) is not None:
            warnings.warn(f"training ended with {shortfall}", stacklevel=2)
        elif args.load_best_model_at_end and state.best_metric is None:
            warnings.warn(
                "no model was evaluated at the final density, so none is the best: the last one is left. Evaluate "
                "after the last pruning",
                stacklevel=2,
            )
        if not masked:
            warnings.warn(
                "weights that were pruned are not zero at the end: something has loaded others. masks.apply(model) "
                "prunes these",
                stacklevel=2,
            )

    def _compare(self, state: TrainerState) -> None:
        """Forget the best model where it is denser than this one, or this one is not at the final density.

        So early stopping counts nothing until then, either: its patience begins where there is no best.
        """
        before, now = self._compared, self.masks
        self._compared = now
        sparser = now is not before and now is not None and (before is None or now.density < before.density)
        if sparser or not self.policy.at_final_density():
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _restore(self, optimizer: Optimizer, state: TrainerState) -> None:
        """Load what ``_store`` put into the optimizer's state, if a checkpoint with it is resumed.

        The order identifies callbacks of one class; each takes the first entry that is left.
        """
        kind = type(self).__name__
        stored: dict[str, list[Any]] = optimizer.param_groups[0].get(_KEY, {})
        # Names the classes that ran, also in checkpoints without an optimizer's state.
        kinds: list[str] = cast("Any", state.stateful_callbacks).setdefault(_KEY, [])
        if entries := stored.get(kind):
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
        if not any(stored.values()):
            optimizer.param_groups[0].pop(_KEY, None)
        if kind not in kinds:
            kinds.append(kind)

    def _store(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        entry = {"step": self._time.step, "policy": self.policy.state_dict()}
        # In a parameter group: state by parameter would be moved to its device, and other keys are dropped on loading.
        state_dict["param_groups"][0].setdefault(_KEY, {}).setdefault(type(self).__name__, []).append(entry)

    def _queue(self, parameter: Any) -> None:
        """A gradient has been accumulated, the first one of this backward pass."""
        if not self._callback_queued:
            self._callback_queued = True
            # DDP queues its own callback, which averages over ranks, while gradients come in. One queued from inside a
            # callback runs after it.
            queue_callback = torch.autograd.Variable._execution_engine.queue_callback
            queue_callback(lambda: queue_callback(self._backward_is_over))

    def _backward_is_over(self) -> None:
        self._callback_queued = False
        gradients = getattr(self._optimizer, "gradient_state", None)  # accelerate's, which counts micro-batches
        if gradients is None or gradients.sync_gradients:
            scaler = getattr(self._optimizer, "scaler", None) if self.policy.reads_gradients else None
            with unscaled(scaler, [unwrap_optimizer(self._optimizer)]):
                self.policy.before_step(self._time)


def _now(state: TrainerState) -> Timestamp:
    return Timestamp(state.global_step, state.epoch or 0.0)


def updates_per_epoch(args: TrainingArguments, loader: Any) -> int | None:
    """As the Trainer counts them; None if the data has no length."""
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def _epochs(args: TrainingArguments, loader: Any) -> float:
    """Epochs of the training; infinity if the data has no length."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    per_epoch = updates_per_epoch(args, loader)
    return math.inf if per_epoch is None else args.max_steps / per_epoch
