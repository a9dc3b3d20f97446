"""Callbacks that keep a network sparse inside a training somebody already has, in either Lightning namespace."""

import math
import warnings
from abc import ABC
from collections.abc import Mapping
from typing import Any, Literal, final

from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback
from torch import Tensor

from prune.masks import Handle, Masks, pack, unpack
from prune.pruner import Pruner
from prune.schedule import check_density, cubic
from workbench.duration import Duration
from workbench.module import network_of


class _Masking(Callback, OtherCallback, ABC):  # type: ignore[misc] - twins; a Trainer of either tree takes this
    """Keeps masks over the module's network while it trains; subclasses say when ``_mask`` is called, and with what.

    Attributes:
        masks: Those in force, or None. They stay after training.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._handle: Handle | None = None
        self._by_hand = self._clips = False

    def _mask(self, trainer: Any, pl_module: Any, masks: Masks) -> None:
        """From now on masked weights are zero, after every step of every optimizer."""
        network = network_of(pl_module)
        _check_ranks(trainer, masks)
        self._release()
        masks.apply(network)
        for optimizer in trainer.optimizers:
            masks.clear_state(optimizer, network)
        self._handle = masks.keep(trainer.optimizers, network)
        self.masks = masks
        self._by_hand = not pl_module.automatic_optimization
        clipping = type(pl_module).configure_gradient_clipping
        own = not clipping.__module__.startswith(("lightning.", "pytorch_lightning."))
        self._clips = bool(trainer.gradient_clip_val) or own

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Keep pruned weights out of the gradients of a module that clips them and steps by hand."""
        if self._handle is not None and self.masks is not None and self._by_hand:
            self.masks.mask_gradients(network_of(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep pruned weights out of the gradient's norm, which is clipped next."""
        if self._handle is not None and self.masks is not None and self._clips and not self._by_hand:
            self.masks.mask_gradients(network_of(pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind, whatever happened."""
        self._release()


@final
class KeepMasked(_Masking):
    """Trains under a fixed mask: pruned weights are zero before the first step and after every one.

    Args:
        masks: Parameter name of the module's ``network`` (or of the module itself, if it has none) -> bool tensor.

    Raises:
        ValueError: If the masks are not valid; when training starts, if they do not fit, or ranks hold different ones.
    """

    def __init__(self, masks: Masks | Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = self._given = masks if isinstance(masks, Masks) else Masks(masks)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After weights and optimizer have been restored, before the first batch."""
        self._mask(trainer, pl_module, self._given)


@final
class GradualPruning(_Masking):
    """Prunes a network while it trains, on the cubic schedule, and keeps what is pruned at zero.

    The density is ``initial`` at ``begin``, ``density`` from ``end`` on, and :func:`prune.schedule.cubic` in between.
    It is lowered after the update that reaches ``begin``, whenever another multiple of ``every`` has passed, and at
    ``end``. Masks are nested, keep exactly as many weights as the density says, and are part of the trainer's
    checkpoints. ``density`` is logged per epoch: kept over prunable weights.

    A second ``fit`` goes on from the masks held, if the network still obeys them; another network starts dense.

    Args:
        density: Share of the prunable weights to keep at the end, in (0, 1].
        begin: When to start, e.g. "1ep" or "500it": epochs, or updates as ``trainer.global_step`` counts them, where
            each step of each of several optimizers is one. 0 is before the first.
        end: When to be done, in the same unit.
        every: Time between two prunings, in either unit.
        pruner: Which weights go; the smallest of the whole network by default. It looks at the module's ``network``,
            or at all of the module if it has none.
        initial: Density at ``begin``, in [density, 1].

    Raises:
        ValueError: If an argument is out of range or the units differ; when training starts, if it ends before
            ``end``; in training, if a density cannot be met.

    Warns:
        UserWarning: By name, if a layer collapses; when training ends, if it did before ``end``.

    Reference: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, section 3.
    """

    def __init__(
        self,
        density: float,
        begin: str | Duration,
        end: str | Duration,
        every: str | Duration,
        pruner: Pruner | None = None,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        check_density(density)
        cubic(1.0, density, initial)
        self.density, self.initial = density, initial
        self.begin, self.end, self.every = Duration.parse(begin), Duration.parse(end), Duration.parse(every)
        self.pruner = Pruner() if pruner is None else pruner
        if self.begin.value and self.begin.unit != self.end.unit:
            raise ValueError(f"begin is {self.begin} and end {self.end}: give both in epochs or both in steps")
        if self.begin.value >= self.end.value:
            raise ValueError(f"begin is {self.begin} and end {self.end}: the end comes after the beginning")
        if self.every.value < 1:
            raise ValueError(f"every is {self.every}: give at least 1ep or 1it")
        self._target, self._moment, self._share, self._restored = math.inf, -1.0, 1.0, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the masks of a checkpoint or of the fit before, or start anew; prune if it is time already."""
        if self.masks is not None and (self._restored or self.masks.obeyed_by(network_of(pl_module))):
            self._mask(trainer, pl_module, self.masks)
        else:
            self.masks, self._target, self._moment, self._share = None, math.inf, -1.0, 1.0
        self._restored = False
        self._check_budget(trainer, pl_module)
        if trainer.global_step == 0:
            self._advance(trainer, pl_module, 0.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune if it is time."""
        done = 1.0 if trainer.is_last_batch else (batch_idx + 1) / trainer.num_training_batches
        self._advance(trainer, pl_module, trainer.current_epoch + done)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the density."""
        pl_module.log("density", self._share, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the final density was not reached."""
        if self._target > self.density and not trainer.fast_dev_run and trainer.is_global_zero:
            at = f"density {self._share:.4g}, not {self.density}: it was to be reached at {self.end}"
            warnings.warn(f"training ended with {at}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Masks, one bit per weight, and how far the schedule is."""
        masks = {
            name: {"bits": pack(mask).cpu(), "shape": list(mask.shape)} for name, mask in (self.masks or {}).items()
        }
        return {"masks": masks, "target": self._target, "moment": self._moment, "share": self._share}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts."""
        stored = {name: unpack(entry["bits"], entry["shape"]) for name, entry in state_dict["masks"].items()}
        self.masks = Masks(stored) if stored else None
        self._target, self._moment = state_dict["target"], state_dict["moment"]
        self._share, self._restored = state_dict["share"], True

    def _advance(self, trainer: Any, pl_module: Any, epochs: float) -> None:
        now: dict[Literal["ep", "it"], float] = {"ep": epochs, "it": trainer.global_step}
        progress = (now[self.end.unit] - self.begin.value) / (self.end.value - self.begin.value)
        if progress < 0:
            return
        moment = math.inf if progress >= 1 else math.floor(now[self.every.unit] / self.every.value)
        if moment <= self._moment:
            return
        self._moment = moment
        target = cubic(min(progress, 1.0), self.density, self.initial)
        if target >= self._target:
            return
        self._target = target
        if target == 1:
            return
        masks = self.pruner(network_of(pl_module), target, within=self.masks)
        self._mask(trainer, pl_module, masks)
        self._share = masks.density

    def _check_budget(self, trainer: Any, pl_module: Any) -> None:
        """Better now than after days: will training get to the end?"""
        if trainer.fast_dev_run or self._target <= self.density:
            return
        budget = math.inf
        if self.end.unit == "ep" and trainer.max_epochs is not None and trainer.max_epochs >= 0:
            budget = trainer.max_epochs
        elif self.end.unit == "it" and pl_module.automatic_optimization:
            budget = trainer.estimated_stepping_batches
        if self.end.value > budget:
            raise ValueError(
                f"end is {self.end}, but training has {budget}{self.end.unit} only: end earlier, or train for longer"
            )


def _check_ranks(trainer: Any, masks: Masks) -> None:
    if trainer.world_size == 1:
        return
    mine = masks.hash()
    first = trainer.strategy.broadcast(mine)
    if first != mine:
        raise ValueError(f"rank {trainer.global_rank} holds mask {mine[:12]}, rank 0 {first[:12]}: share one mask")
