"""What every policy has: a model and optimizers it is attached to, masks in force, and moments it is told of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import nn
from torch.optim import Optimizer

from prune.masks import Handle, Masks, pack, unpack


class Moment(NamedTuple):
    """How far a training is.

    Args:
        step: Optimizer updates done.
        epoch: Epochs done, with the share of the one that is under way.
    """

    step: int
    epoch: float


START = Moment(0, 0.0)


class Policy(ABC):
    """Decides which weights of a model are kept while it trains, and keeps the others at zero.

    Drive it by hand, or let :meth:`follow` hang it on the optimizer, in which case the loop needs no other line. By
    hand: :meth:`attach` before the first batch, :meth:`before_step` when the gradients are whole and before they are
    clipped, :meth:`after_step` after every update, :meth:`detach` in the end.

    Attributes:
        masks: Those in force, or None. They stay after :meth:`detach`, and are part of :meth:`state_dict`.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []
        self._handle: Handle | None = None
        self._restored = False
        self._updates = 0

    # What a subclass says

    @abstractmethod
    def _begin(self, moment: Moment, taken_up: bool) -> None:
        """Training starts, or goes on with the masks of before (``taken_up``), which are in force already."""

    @abstractmethod
    def _observe(self, moment: Moment) -> None:
        """The gradients of an update are whole, and dense."""

    @abstractmethod
    def _advance(self, moment: Moment) -> None:
        """An update has been done."""

    @abstractmethod
    def _progress(self) -> dict[str, Any]:
        """What must be remembered besides the masks."""

    @abstractmethod
    def _take_up(self, progress: Mapping[str, Any]) -> None:
        """Remember it again; an empty mapping forgets everything."""

    # What drives it

    @final
    def attach(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], moment: Moment = START) -> None:
        """Start at ``moment``, or go on: after :meth:`load_state_dict`, or where ``model`` still obeys the masks held.

        Raises:
            ValueError: If masks do not fit the model, or no optimizer holds its weights.
        """
        self.detach()
        self._model = model
        self._optimizers = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        taken_up = self.masks is not None and (self._restored or self.masks.obeyed_by(model))
        self._restored = False
        if taken_up and self.masks is not None:
            self._enforce(self.masks)
        else:
            self.masks = None
            self._take_up({})
        self._begin(moment, taken_up)

    @final
    def before_step(self, moment: Moment, clip: bool = True) -> None:
        """Look at the gradients of the update that comes; with ``clip`` zero those of pruned weights."""
        self._observe(moment)
        if clip:
            self.mask_gradients()

    @final
    def after_step(self, moment: Moment) -> None:
        """Go on to ``moment``: an update has been done."""
        self._advance(moment)

    @final
    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, so that the norm they are clipped by counts only live ones."""
        if self._handle is not None and self.masks is not None and self._model is not None:
            self.masks.mask_gradients(self._model)

    @final
    def detach(self) -> None:
        """Take every hook off; a second call does nothing."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._model, self._optimizers = None, None, []

    @final
    def follow(
        self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], steps_per_epoch: int | None = None
    ) -> Handle:
        """Attach, and be driven by the optimizer's own step from now on: for a loop that is not to be touched.

        An update is a step of the first optimizer; one that a gradient scaler skips is none. ``steps_per_epoch`` is
        needed where times are given in epochs. Clip gradients after :meth:`mask_gradients`, if at all. After
        :meth:`load_state_dict` counting goes on from the update that was saved.

        Returns:
            A handle: ``handle.remove()``, or leaving ``with handle:``, detaches.
        """
        first = optimizers[0] if isinstance(optimizers, Sequence) else optimizers
        done = self._updates if self._restored else 0

        def moment() -> Moment:
            return Moment(done, math.nan if steps_per_epoch is None else done / steps_per_epoch)

        def before(*_: Any) -> None:
            self.before_step(moment(), clip=False)

        def after(*_: Any) -> None:
            nonlocal done
            done = self._updates = done + 1
            self.after_step(moment())

        self.attach(model, optimizers, moment())
        hooks = [first.register_step_pre_hook(before), first.register_step_post_hook(after)]
        return Handle([*(hook.remove for hook in hooks), self.detach])

    # What it remembers

    @final
    def state_dict(self) -> dict[str, Any]:
        """Masks, one bit per weight, and how far the policy is."""
        masks = {n: {"bits": pack(mask).cpu(), "shape": list(mask.shape)} for n, mask in (self.masks or {}).items()}
        return {"masks": masks, "updates": self._updates, **self._progress()}

    @final
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there when attached."""
        stored = {name: unpack(entry["bits"], entry["shape"]) for name, entry in state_dict["masks"].items()}
        self.masks = Masks(stored) if stored else None
        self._updates = state_dict["updates"]
        self._take_up({name: value for name, value in state_dict.items() if name not in ("masks", "updates")})
        self._restored = True

    def densities(self) -> dict[str, float]:
        """``density``, and ``density/<parameter>`` of every one that has a mask: what callbacks log."""
        if self.masks is None:
            return {"density": 1.0}
        layers = {f"density/{name}": kept / total for name, (kept, total) in self.masks.counts().items()}
        return {"density": self.masks.density, **layers}

    # What subclasses use

    @final
    def _enforce(self, masks: Masks) -> None:
        """From now on the weights that ``masks`` prune are zero, after every step of every optimizer."""
        assert self._model is not None, "attached"
        if self._handle is not None:
            self._handle.remove()
        masks.apply(self._model)
        for optimizer in self._optimizers:
            masks.clear_state(optimizer, self._model)
        self._handle = masks.keep(self._optimizers, self._model)
        self.masks = masks
