"""A policy decides which weights of a model are kept while it trains, and keeps the others at zero.

Order of events, with what a subclass implements in brackets::

    attach(model, optimizers, time)   [_scope]  claim the weights
        │                             [_load_state]  with {}: forget, if the model does not obey the masks held
        │                             [_start]
        ▼
    ┌─► backward
    │   before_step(time)             [_read_gradients]  once an update; may change the masks
    │       │                         then the gradients of pruned weights are zeroed
    │       ▼
    │   clip                          the norm counts kept weights only
    │   optimizer.step                step post hook: weights *= masks
    │   after_step(time)              [_after_update]  may change the masks
    └───────┘
        ▼
    detach                            hooks off, weights released; masks and state stay

:meth:`Policy.load_state_dict` comes before ``attach``. Where gradients are zeroed early, before all micro-batches are
in, the policy must still see dense ones: [_needs_dense_gradients].
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune.masks import Masks
from prune.masks.enforce import Handle, mask_multiplier
from prune.masks.memory import finite_on_ranks, local, owners, shard, summed
from prune.masks.stepping import hook_steps, unwrap_optimizer
from prune.policies.calibration import Calibration, calibrated, check_frozen
from prune.policies.history import Watch, check_new, check_same_settings, say_strayed, warn_pruned
from prune.policies.optimizers import first_holding, skips_step
from prune.policies.ownership import claim, release
from prune.policies.timestamp import START, Timestamp
from prune.pruner import Pruner
from prune.pruner.pruner import Scores
from workbench.distributed.ranks import all_gather, world_size
from workbench.duration import Duration
from workbench.messages import some
from workbench.models.wrappers import adapters, unwrap

_COMMON = ("masks", "updates", "parameters", "settings")


class Policy(ABC):
    """Decides which weights of a model are kept while it trains, and keeps the others at zero.

    :meth:`follow` attaches it to a model and its optimizer, after which a training loop needs no other line. A loop
    that calls the events itself uses :meth:`attach` before the first batch, :meth:`before_step` when the gradients are
    complete and before they are clipped, :meth:`after_step` after every update, and :meth:`detach` at the end.

    A copy, by ``copy.deepcopy`` or pickle, is not attached.

    Attributes:
        masks: Those in force, or None. They stay after :meth:`detach`, and are part of :meth:`state_dict`.
        reads_gradients: Whether it reads gradients, so that they must be there before the optimizer steps.
        starts_dense: Whether a training without its state starts with a dense network; not so where masks are given.

    Args:
        times: All that the policy is given, to know whether any is in epochs.
        batches: Batches that a criterion which needs data is calibrated on.
    """

    def __init__(self, *times: Duration, batches: int = 0) -> None:
        self.masks: Masks | None = None
        self.reads_gradients, self.starts_dense = False, True
        self._batches = batches
        self._in_epochs = any(time.unit == "ep" for time in times)
        self._restored, self._updates, self._parameters = False, 0, 0
        self._clear_attachment()

    def _clear_attachment(self) -> None:
        self._model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []
        self._averages: list[nn.Module] = []
        self._calibration: Calibration | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._multiply: Callable[[], None] | None = None
        self._masking: Handle | None = None
        self._following: Handle | None = None
        self._counted: Optimizer | None = None
        self._watch: Watch | None = None
        self._time, self._gradients_read = START, False

    @final
    def __getstate__(self) -> dict[str, Any]:
        """Everything but what it is attached to."""
        unattached = object.__new__(type(self))
        unattached._clear_attachment()
        return {**vars(self), **vars(unattached)}

    # What a subclass implements

    @abstractmethod
    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights it prunes, by name."""

    @abstractmethod
    def _start(self, time: Timestamp, resumed: bool) -> None:
        """Training starts; or goes on under the masks held, which are in force already (``resumed``)."""

    def _needs_dense_gradients(self, time: Timestamp) -> bool:
        """Whether the next update's gradients of pruned weights are read; not by default."""
        return False

    def _read_gradients(self, time: Timestamp) -> None:  # noqa: B027 - most policies do nothing here
        """The gradients of an update are complete, and those of pruned weights are there where they are needed."""

    def _after_update(self, time: Timestamp) -> None:  # noqa: B027 - a policy of fixed masks does nothing here
        """An update has been done."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the masks."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`_state` gave; an empty mapping resets it."""

    @abstractmethod
    def check_budget(self, updates: float, epochs: float) -> None:
        """Check before training that it will be long enough.

        Args:
            updates: Updates of the training; infinity if unknown.
            epochs: Epochs of the training; infinity if unknown.

        Raises:
            ValueError: If it is too short.
        """

    def _settings(self) -> dict[str, Any]:
        """What a training has to be resumed with, JSON values by the names of arguments; nothing by default."""
        return {}

    @abstractmethod
    def at_final_density(self) -> bool:
        """Whether the network is as sparse as it will get: what is scored before is another, denser network."""

    @abstractmethod
    def shortfall(self) -> str | None:
        """What the policy has not reached yet, for a warning when training ends; None if it is complete."""

    # Events

    @final
    def attach(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        time: Timestamp = START,
        averages: Iterable[nn.Module] = (),
        calibration: Calibration | None = None,
    ) -> bool:
        """Start at ``time``, or go on: after :meth:`load_state_dict`, or where ``model`` still obeys the masks held.

        An update is a step of one optimizer, the first that holds one of the weights (:meth:`counts_steps_of`).

        Args:
            model: What is pruned; compiled or data-parallel wrappers are looked through.
            optimizers: All that step its weights.
            time: How far the training is.
            averages: Models that its weights are averaged into (EMA, SWA), of the same parameter names: they are masked
                whenever the masks change, so that an average is as sparse as the model.
            calibration: For a criterion that needs data: (criterion, number of batches) -> the arguments ``loader`` and
                ``loss`` of a pruner's call. Called now, as a check, and at every pruning.

        Returns:
            Whether it goes on, under the masks held.

        Raises:
            ValueError: If masks do not fit the model, no optimizer holds its weights, another attached policy prunes
                one of them, or the gradient of a frozen one is to be read.

        Warns:
            UserWarning: By name, if frozen weights are pruned that ``include`` does not name; if it starts although
                many weights are exactly 0, which will grow again.
        """
        return self._attach(model, optimizers, time, averages, calibration, warn_pruned)

    def _attach(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        time: Timestamp,
        averages: Iterable[nn.Module],
        calibration: Calibration | None,
        look_back: Callable[[str, Mapping[str, nn.Parameter]], None],
    ) -> bool:
        """:meth:`attach`, with what is done about weights that look pruned already."""
        self.detach()
        try:
            self._model = unwrap(model)
            several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
            self._optimizers = [unwrap_optimizer(optimizer) for optimizer in several]
            self._averages = [unwrap(average) for average in averages]
            self._time, self._calibration = time, calibration
            resumed = self.masks is not None and (self._restored or self.masks.is_applied_to(self._model))
            if not (resumed or self._restored):
                self.masks = None
                self._load_state({})
            self._weights = self._scope(self._model)
            self._parameters = sum(parameter.numel() for parameter in self._model.parameters())
            frozen = [name for name, weight in self._weights.items() if not weight.requires_grad]
            if frozen and self.reads_gradients:
                raise ValueError(
                    f"{some(frozen)}: frozen, so this {type(self).__name__} finds no gradient there; exclude it"
                )
            claim(self, self._weights)
            hooks = [hook_steps(optimizer, self._mask_weights, self._mask_gradients) for optimizer in several]
            self._masking = Handle([remove for removers in hooks for remove in removers])
            self._counted = first_holding(self._optimizers, {**self._weights, **adapters(self._model)})
            if resumed and self.masks is not None:
                self._enforce(self.masks, clear_state=False)
            elif self.starts_dense and not self._restored:
                look_back(type(self).__name__, self._weights)
            self._start(time, resumed)
            self._restored = False
        except BaseException:
            self.detach()
            raise
        return resumed

    @final
    def before_step(self, time: Timestamp, clip: bool = True) -> None:
        """The gradients of the next update are complete; with ``clip``, zero those of pruned weights."""
        self._time = time
        self._read_gradients_once()
        if clip:
            self._mask_gradients()

    @final
    def after_step(self, time: Timestamp) -> None:
        """An update has been done; training is at ``time``."""
        self._time, self._updates, self._gradients_read = time, time.step, False
        self._after_update(time)

    @final
    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """Whether a step of ``optimizer`` is an update: of several, the first that holds one of the weights."""
        return self._counted is not None and unwrap_optimizer(optimizer) is self._counted

    @final
    def mask_gradients(self, complete: bool = True) -> None:
        """Zero the gradients of pruned weights, so that the norm they are clipped by counts only kept ones.

        Args:
            complete: Whether they are those of the update. If more may be added, gradients that the policy is still to
                read are left as they are.
        """
        if complete:
            self._read_gradients_once()
        if self._gradients_read or not self._needs_dense_gradients(self._time):
            self._mask_gradients()

    @final
    def detach(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in (self._masking, self._following):
            if handle is not None:
                handle.remove()
        release(self, self._weights)
        self._clear_attachment()

    @final
    def follow(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        steps_per_epoch: int | None = None,
        averages: Iterable[nn.Module] = (),
        calibration: Calibration | None = None,
        anew: bool = False,
    ) -> Handle:
        """Attach, and take every event from the optimizer's steps: for a training loop that stays as it is.

        An update is a step of the first optimizer that holds one of the weights; a step that a gradient scaler skips is
        none. Where gradients are clipped, call :meth:`mask_gradients` before. After :meth:`load_state_dict` counting
        goes on from the update that was saved.

        Args:
            model: As for :meth:`attach`.
            optimizers: As for :meth:`attach`.
            steps_per_epoch: Updates in an epoch, where times are given in epochs.
            averages: As for :meth:`attach`.
            calibration: As for :meth:`attach`.
            anew: Start here, at update 0 and with a dense network, although weights look pruned or the optimizer has
                stepped. Without it that is refused, for it is what a training looks like whose policy was not restored.

        Returns:
            A handle: ``handle.remove()``, or leaving ``with handle:``, detaches.

        Raises:
            ValueError: As :meth:`attach`, or if times are given in epochs and ``steps_per_epoch`` is not; without
                ``anew``, if many weights are exactly 0 or the optimizer has stepped, and no state was loaded; in
                training, if gradients are to be read and are computed in a closure, after the optimizer's step has
                begun.

        Warns:
            UserWarning: As :meth:`attach`; by name, at the next step and at the end, if pruned weights are not zero
                any more, because other ones were loaded; at the end, if the policy is not complete.
        """
        if self._in_epochs and not steps_per_epoch:
            raise ValueError(
                f"steps_per_epoch is {steps_per_epoch}, but times of this {type(self).__name__} are in epochs: "
                "give the number of updates in an epoch, or times such as '500it'"
            )
        done = begun = self._updates if self._restored else 0

        def time() -> Timestamp:
            return Timestamp(done, done / steps_per_epoch if steps_per_epoch else math.nan)

        watch = Watch()

        def look(when: str) -> None:
            if self.masks is not None and (strays := watch.strays(self._weights, self.masks)):
                say_strayed(strays, self.masks, when)

        def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(f"before update {done + 1}")
            if self.reads_gradients and any(callable(argument) for argument in (*args, *kwargs.values())):
                raise ValueError(
                    f"the optimizer is given a closure, and this {type(self).__name__} looks at gradients before the "
                    "step: call backward() first and step() without one"
                )
            if not skips_step(optimizer):
                self.before_step(time(), clip=False)

        def after(optimizer: Any, *_: Any) -> None:
            nonlocal done
            if not skips_step(optimizer):
                done += 1
                self.after_step(time())
            watch.note(self._weights)

        def look_back(kind: str, weights: Mapping[str, nn.Parameter]) -> None:
            if not anew:
                check_new(kind, weights, self._optimizers)

        self._attach(model, optimizers, time(), averages, calibration, look_back)
        self._watch = watch
        watch.note(self._weights)
        counted = self._counted
        assert counted is not None, "attached"
        hooks = [counted.register_step_pre_hook(before).remove, counted.register_step_post_hook(after).remove]
        following = self._following = Handle(hooks)

        def end() -> None:
            following.remove()
            # The policy may follow another model by now, which an old handle must not end.
            if self._following is following:
                self.detach()

        def say() -> None:
            if self._following is following:
                look("at the end")
                if done > begun and (shortfall := self.shortfall()) is not None:
                    warnings.warn(f"training ended with {shortfall}", stacklevel=4)

        return Handle([end], say)

    # State

    @final
    def state_dict(self) -> dict[str, Any]:
        """Masks, one bit per weight, and how far the policy is; tensors and plain values."""
        masks = {} if self.masks is None else self.masks.state_dict()
        common = {"masks": masks, "updates": self._updates, "parameters": self._parameters}
        return {**common, "settings": self._settings(), **self._state()}

    @final
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there when attached.

        Raises:
            ValueError: If it is the state of a policy of other settings, or no policy's state.
        """
        if missing := [name for name in _COMMON if name not in state_dict]:
            raise ValueError(
                f"this is no state of a {type(self).__name__}: it has no {missing}, but "
                f"{some(state_dict) or 'nothing'}. Give what state_dict() of the policy returned; of a training that "
                "was saved without, start anew with follow(..., anew=True)"
            )
        check_same_settings(type(self).__name__, state_dict["settings"], self._settings())
        self.masks = Masks.from_state_dict(state_dict["masks"]) if state_dict["masks"] else None
        self._updates, self._parameters = state_dict["updates"], state_dict["parameters"]
        self._load_state({name: value for name, value in state_dict.items() if name not in _COMMON})
        self._restored = True

    @final
    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, total) of every weight in scope, by name."""
        if self.masks is not None:
            return self.masks.counts()
        return {name: (weight.numel(), weight.numel()) for name, weight in self._weights.items()}

    @property
    @final
    def parameters(self) -> int:
        """Number of all parameters of the model that it is, or was last, attached to."""
        return self._parameters

    @final
    def densities(self) -> dict[str, float]:
        """``density``, ``model_density`` and ``density/<parameter>`` of every weight in scope: what callbacks log."""
        return densities(self.counts(), self._parameters)

    # What subclasses use

    @final
    def _check_pruner(self, pruner: Pruner) -> None:
        """Check before training that ``pruner`` can select later: its data is there, its weights are not frozen."""
        assert self._model is not None, "attached"
        check_frozen(pruner, self._weights, adapted=any(each.requires_grad for each in adapters(self._model).values()))
        calibrated(pruner.axes.criterion, self._batches, self._calibration)

    @final
    def _select(self, pruner: Pruner, density: float, scores: Mapping[str, Scores] | None = None) -> Masks:
        """Masks of that density within those in force; by ``scores``, arguments of a pruner's call, if given."""
        assert self._model is not None, "attached"
        if scores:
            given, units = scores.get("scores"), scores.get("unit_scores")
            return pruner(self._model, density, self.masks, scores=given, unit_scores=units)
        data = calibrated(pruner.axes.criterion, self._batches, self._calibration)
        return pruner(self._model, density, self.masks, **data)

    @final
    def _enforce(self, masks: Masks, clear_state: bool = True) -> None:
        """From now on the weights that ``masks`` prune are zero, after every step of every optimizer.

        With ``clear_state``, what the optimizers remember (momentum) is zeroed where a weight is pruned, or was pruned
        until now.
        """
        assert self._model is not None, "attached"
        _check_same_on_ranks(masks)
        for model in (self._model, *self._averages):
            masks.apply(model)
        if clear_state:
            stayed = masks if self.masks is None or self.masks.keys() != masks.keys() else masks & self.masks
            for optimizer in self._optimizers:
                stayed.clear_state(optimizer, self._model)
        self._multiply = mask_multiplier(masks, self._model)
        self.masks = masks

    @final
    def _gradients(self, of_pruned: bool = True) -> dict[str, Tensor]:
        """Gradients in scope, without a scaler's factor; empty if one is not finite, so that the update is skipped.

        Without ``of_pruned`` those of pruned weights may be infinite or NaN, as that of sqrt|w| is at 0; then they are
        0 in what is returned, which are this rank's parts.
        """
        grads = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        if not finite_on_ranks(grads.values()):
            masks = {} if of_pruned or self.masks is None else self.masks
            kept = {name: shard(masks[name], grad) for name, grad in grads.items() if name in masks}
            bad = {n: local(grad).isfinite().logical_not() & kept.get(n, True) for n, grad in grads.items()}
            counts = [summed(bad[name].sum(), owners(grad)) for name, grad in grads.items()]
            if bool(torch.stack([count.to(counts[0].device) for count in counts]).any()):
                self._gradients_read = False  # the next update's gradients are read in their place
                return {}
            grads = {name: local(grad).masked_fill(~kept[name], 0) for name, grad in grads.items()}
        # Set by GradScaler while a fused optimizer steps, which unscales gradients inside its kernel.
        scale = getattr(self._counted, "grad_scale", None)
        return grads if scale is None else {name: grad / scale.to(grad.device) for name, grad in grads.items()}

    def _read_gradients_once(self) -> None:
        if not self._gradients_read and self._model is not None:
            self._gradients_read = True
            self._read_gradients(self._time)

    def _mask_gradients(self) -> None:
        if self.masks is not None and self._model is not None:
            self.masks.mask_gradients(self._model)

    def _mask_weights(self, *_: Any) -> None:
        if self._multiply is not None:
            self._multiply()
        if self._watch is not None:
            self._watch.note(self._weights)  # also after the steps of optimizers that are not counted


def densities(counts: Mapping[str, tuple[int, int]], parameters: int) -> dict[str, float]:
    """Densities by name, each 1 where there is nothing to count.

    Args:
        counts: Weight -> kept and total.
        parameters: Number of all parameters of the model; those that are not among the weights are kept.

    Returns:
        ``density``, kept over total; ``model_density``, of all parameters; and ``density/<parameter>``.
    """
    layers = {f"density/{name}": kept / total for name, (kept, total) in counts.items()}
    kept, total = (sum(pair[side] for pair in counts.values()) for side in (0, 1))
    whole = max(parameters, total) or 1
    return {"density": kept / (total or 1), "model_density": (whole - total + kept) / whole, **layers}


def _check_same_on_ranks(masks: Masks) -> None:
    if world_size() == 1:
        return
    hashes = all_gather(masks.hash())
    if len(set(hashes)) > 1:
        raise ValueError(f"ranks hold different masks, by rank {[each[:12] for each in hashes]}: share one mask")
