"""What every policy has: a model and optimizers it is attached to, masks in force, and moments it is told of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune.masks import Masks
from prune.masks.enforce import Handle, bare, multiplying, unwrapped
from prune.masks.memory import local, owners, shard, summed
from prune.policies.asking import Evidence, check_frozen, shown
from prune.policies.moment import START, Moment
from prune.policies.ownership import claim, leading, release, skipped
from prune.pruner import Pruner
from workbench.distributed.ranks import everyone, world
from workbench.duration import Duration
from workbench.messages import some


class Policy(ABC):
    """Decides which weights of a model are kept while it trains, and keeps the others at zero.

    Drive it by hand, or let :meth:`follow` hang it on the optimizer, in which case the loop needs no other line. By
    hand: :meth:`attach` before the first batch, :meth:`before_step` when the gradients are whole and before they are
    clipped, :meth:`after_step` after every update, :meth:`detach` in the end.

    A copy, by ``copy.deepcopy`` or pickle, is not attached.

    Attributes:
        masks: Those in force, or None. They stay after :meth:`detach`, and are part of :meth:`state_dict`.
        reads_gradients: Whether it looks at gradients, so that they must be there before the optimizer steps.
    """

    def __init__(self, *times: Duration) -> None:
        self.masks: Masks | None = None
        self.reads_gradients = False
        self._in_epochs = any(time.unit == "ep" for time in times)
        self._restored, self._updates = False, 0
        self._free()

    def _free(self) -> None:
        self._model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []
        self._averages: list[nn.Module] = []
        self._evidence: Evidence | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._multiply: Callable[[], None] | None = None
        self._hooks: Handle | None = None
        self._driver: Handle | None = None
        self._lead: Optimizer | None = None
        self._moment, self._looked = START, False

    @final
    def __getstate__(self) -> dict[str, Any]:
        """Everything but what it is attached to."""
        free = object.__new__(type(self))
        free._free()
        return {**vars(self), **vars(free)}

    # What a subclass says

    @abstractmethod
    def _scope(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights it decides about, by name; nobody else may."""

    @abstractmethod
    def _begin(self, moment: Moment, taken_up: bool) -> None:
        """Training starts, or goes on with the masks of before (``taken_up``), which are in force already."""

    @abstractmethod
    def _needs_dense(self, moment: Moment) -> bool:
        """Whether the next update's gradients of pruned weights are looked at."""

    @abstractmethod
    def _observe(self, moment: Moment) -> None:
        """The gradients of an update are whole, and dense where they were to be."""

    @abstractmethod
    def _advance(self, moment: Moment) -> None:
        """An update has been done."""

    @abstractmethod
    def _progress(self) -> dict[str, Any]:
        """What must be remembered besides the masks."""

    @abstractmethod
    def _take_up(self, progress: Mapping[str, Any]) -> None:
        """Remember it again; an empty mapping forgets everything."""

    @abstractmethod
    def check_budget(self, updates: float, epochs: float) -> None:
        """Better now than after days: is a training of this length long enough?

        Args:
            updates: How many there will be; infinity if nobody knows.
            epochs: Likewise.

        Raises:
            ValueError: If it is not.
        """

    @abstractmethod
    def unmet(self) -> str | None:
        """What was to be reached and has not been, in words; None if everything has."""

    # What drives it

    @final
    def attach(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        moment: Moment = START,
        averages: Iterable[nn.Module] = (),
        evidence: Evidence | None = None,
    ) -> None:
        """Start at ``moment``, or go on: after :meth:`load_state_dict`, or where ``model`` still obeys the masks held.

        Drive it by the steps of one optimizer, the first that holds one of the weights (:meth:`leads`).

        Args:
            model: What is pruned; compiled or data-parallel wrappers are looked through.
            optimizers: All that step its weights.
            moment: How far the training is.
            averages: Models that its weights are averaged into (EMA, SWA), of the same parameter names: they are masked
                whenever the masks change, so that an average is as sparse as the model.
            evidence: What a criterion that looks at data is shown: criterion -> the arguments ``loader`` and ``loss``
                of a pruner's call. Asked now, whether it can be shown them, and at every pruning.

        Raises:
            ValueError: If masks do not fit the model, no optimizer holds its weights, another policy that is attached
                decides about one of them, or a gradient is to be looked at of one that is frozen.

        Warns:
            UserWarning: By name, if frozen weights are pruned that ``include`` does not name.
        """
        self.detach()
        try:
            self._model = bare(model)
            several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
            self._optimizers = [unwrapped(optimizer) for optimizer in several]
            self._averages = [bare(average) for average in averages]
            self._moment, self._evidence = moment, evidence
            taken_up = self.masks is not None and (self._restored or self.masks.obeyed_by(self._model))
            if not (taken_up or self._restored):
                self.masks = None
                self._take_up({})
            self._weights = self._scope(self._model)
            frozen = [name for name, weight in self._weights.items() if not weight.requires_grad]
            if frozen and self.reads_gradients:
                raise ValueError(
                    f"{some(frozen)}: frozen, so this {type(self).__name__} finds no gradient there; exclude it"
                )
            claim(self, self._weights)
            hooks = [optimizer.register_step_post_hook(self._mask_weights) for optimizer in self._optimizers]
            self._hooks = Handle([hook.remove for hook in hooks])
            if taken_up and self.masks is not None:
                self._enforce(self.masks, anew=False)
            self._begin(moment, taken_up)
            self._restored = False
            self._lead = leading(self._optimizers, self._weights)
        except BaseException:
            self.detach()
            raise

    @final
    def before_step(self, moment: Moment, clip: bool = True) -> None:
        """Look at the gradients of the update that comes; with ``clip`` zero those of pruned weights."""
        self._moment = moment
        self._look()
        if clip:
            self._mask_gradients()

    @final
    def after_step(self, moment: Moment) -> None:
        """Go on to ``moment``: an update has been done."""
        self._moment, self._updates, self._looked = moment, moment.step, False
        self._advance(moment)

    @final
    def leads(self, optimizer: Optimizer) -> bool:
        """Whether a step of ``optimizer`` is an update: of several, the first that holds one of the weights."""
        return self._lead is not None and unwrapped(optimizer) is self._lead

    @final
    def mask_gradients(self, whole: bool = True) -> None:
        """Zero the gradients of pruned weights, so that the norm they are clipped by counts only live ones.

        Args:
            whole: Whether they are those of the update. If there may be more to come, those that the policy is still
                to look at are left as they are.
        """
        if whole:
            self._look()
        if self._looked or not self._needs_dense(self._moment):
            self._mask_gradients()

    @final
    def detach(self) -> None:
        """Take every hook off; a second call does nothing."""
        for handle in (self._hooks, self._driver):
            if handle is not None:
                handle.remove()
        release(self, self._weights)
        self._free()

    @final
    def follow(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        steps_per_epoch: int | None = None,
        averages: Iterable[nn.Module] = (),
        evidence: Evidence | None = None,
    ) -> Handle:
        """Attach, and be driven by the optimizer's own step from now on: for a loop that is not to be touched.

        An update is a step of the first optimizer that holds one of the weights; one that a gradient scaler skips is
        none. Where gradients are clipped, call :meth:`mask_gradients` before. After :meth:`load_state_dict` counting
        goes on from the update that was saved.

        Args:
            model: As for :meth:`attach`.
            optimizers: As for :meth:`attach`.
            steps_per_epoch: Updates in an epoch, where times are given in epochs.
            averages: As for :meth:`attach`.
            evidence: As for :meth:`attach`.

        Returns:
            A handle: ``handle.remove()``, or leaving ``with handle:``, detaches.

        Raises:
            ValueError: As :meth:`attach`, or if times are given in epochs and ``steps_per_epoch`` is not; in training,
                if gradients are to be looked at and are computed in a closure, after the optimizer's step has begun.
        """
        if self._in_epochs and not steps_per_epoch:
            raise ValueError(
                f"steps_per_epoch is {steps_per_epoch}, but times of this {type(self).__name__} are in epochs: "
                "give the number of updates in an epoch, or times such as '500it'"
            )
        done = self._updates if self._restored else 0

        def moment() -> Moment:
            return Moment(done, done / steps_per_epoch if steps_per_epoch else math.nan)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.reads_gradients and any(callable(given) for given in (*args, *kwargs.values())):
                raise ValueError(
                    f"the optimizer is given a closure, and this {type(self).__name__} looks at gradients before the "
                    "step: call backward() first and step() without one"
                )
            self.before_step(moment(), clip=False)

        def after(stepped: Any, *_: Any) -> None:
            nonlocal done
            if not skipped(stepped):
                done += 1
                self.after_step(moment())

        self.attach(model, optimizers, moment(), averages, evidence)
        lead = self._lead
        assert lead is not None, "attached"
        hooks = [lead.register_step_pre_hook(before).remove, lead.register_step_post_hook(after).remove]
        driver = self._driver = Handle(hooks)

        def end() -> None:
            driver.remove()
            if self._driver is driver:
                self.detach()

        return Handle([end])

    # What it remembers

    @final
    def state_dict(self) -> dict[str, Any]:
        """Masks, one bit per weight, and how far the policy is."""
        masks = {} if self.masks is None else self.masks.state_dict()
        return {"masks": masks, "updates": self._updates, **self._progress()}

    @final
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there when attached."""
        self.masks = Masks.from_state_dict(state_dict["masks"]) if state_dict["masks"] else None
        self._updates = state_dict["updates"]
        self._take_up({name: value for name, value in state_dict.items() if name not in ("masks", "updates")})
        self._restored = True

    @final
    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, total) of every weight decided about, by name."""
        if self.masks is not None:
            return self.masks.counts()
        return {name: (weight.numel(), weight.numel()) for name, weight in self._weights.items()}

    @final
    def densities(self) -> dict[str, float]:
        """``density``, and ``density/<parameter>`` of every weight that is decided about: what callbacks log."""
        return densities(self.counts())

    # What subclasses use

    @final
    def _check_pruner(self, pruner: Pruner) -> None:
        """Make sure before training that it can be asked later; say which frozen weights it will prune."""
        check_frozen(pruner, self._weights)
        shown(pruner.axes.criterion, self._evidence)

    @final
    def _choose(self, pruner: Pruner, density: float, scores: Mapping[str, Tensor] | None = None) -> Masks:
        """Masks of that density within those in force, by ``scores`` if given."""
        assert self._model is not None, "attached"
        if scores is not None:
            return pruner(self._model, density, self.masks, scores=scores)
        return pruner(self._model, density, self.masks, **shown(pruner.axes.criterion, self._evidence))

    @final
    def _enforce(self, masks: Masks, anew: bool = True) -> None:
        """From now on the weights that ``masks`` prune are zero, after every step of every optimizer.

        What the optimizers remember is cleared where a weight is pruned, or was until now; where masks are not set
        ``anew`` but go on, it stays.
        """
        assert self._model is not None, "attached"
        _check_alike(masks)
        for model in (self._model, *self._averages):
            masks.apply(model)
        if anew:
            stayed = masks if self.masks is None or self.masks.keys() != masks.keys() else masks & self.masks
            for optimizer in self._optimizers:
                stayed.clear_state(optimizer, self._model)
        self._multiply = multiplying(masks, self._model)
        self.masks = masks

    @final
    def _gradients(self, dead: bool = True) -> dict[str, Tensor]:
        """Those of the weights decided about, where there is one; none if one is not finite, so that the step is void.

        Those that a fused optimizer is still to unscale are unscaled. Without ``dead`` those of pruned weights may be
        anything, as that of sqrt|w| at 0 is.
        """
        grads = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        looked_at = {} if dead or self.masks is None else {n: shard(self.masks[n], grad) for n, grad in grads.items()}
        bad = {n: local(grad).isfinite().logical_not() & looked_at.get(n, True) for n, grad in grads.items()}
        odd = [summed(bad[name].sum(), owners(grad)) for name, grad in grads.items()]
        if odd and bool(torch.stack([count.to(odd[0].device) for count in odd]).any()):
            self._looked = False
            return {}
        scale = getattr(self._lead, "grad_scale", None)
        return grads if scale is None else {name: grad / scale.to(grad.device) for name, grad in grads.items()}

    def _look(self) -> None:
        if not self._looked and self._model is not None:
            self._looked = True
            self._observe(self._moment)

    def _mask_gradients(self) -> None:
        if self.masks is not None and self._model is not None:
            self.masks.mask_gradients(self._model)

    def _mask_weights(self, *_: Any) -> None:
        if self._multiply is not None:
            self._multiply()


def densities(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """``density``, kept over total, and ``density/<parameter>``; 1 where there is nothing to count."""
    layers = {f"density/{name}": kept / total for name, (kept, total) in counts.items()}
    return {"density": sum(kept for kept, _ in counts.values()) / (sum(t for _, t in counts.values()) or 1), **layers}


def _check_alike(masks: Masks) -> None:
    if world() == 1:
        return
    hashes = everyone(masks.hash())
    if len(set(hashes)) > 1:
        raise ValueError(f"ranks hold different masks, by rank {[each[:12] for each in hashes]}: share one mask")
