"""Callbacks that keep a network sparse inside a training somebody already has, in either Lightning namespace."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from pytorch_lightning import Callback as OtherCallback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prune.masks import Masks
from workbench.module import network_of


class _Base(Callback, OtherCallback):  # type: ignore[misc] - the two trees are twins; a Trainer of either takes this
    """Keeps masks over the module's network while it trains."""

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._handles: list[RemovableHandle] = []

    def _mask(self, trainer: Any, network: nn.Module, masks: Masks) -> None:
        """From now on exactly these weights are nonzero, after every step of every optimizer."""
        self._release()
        self.masks = masks
        masks.apply(network)
        for optimizer in trainer.optimizers:
            masks.clear_state(optimizer, network)
            self._handles.append(masks.keep(optimizer, network))

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep pruned weights out of the gradient's norm, which is clipped next."""
        if self.masks is not None and trainer.gradient_clip_val:
            self.masks.mask_gradients(network_of(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave no hook behind."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind, whatever happened."""
        self._release()


class KeepMasked(_Base):
    """Trains under a fixed mask: pruned weights are zero before the first step and after every one.

    Args:
        masks: Parameter name of the module's ``network`` (or of the module itself, if it has none) -> bool tensor.

    Raises:
        ValueError: When training starts, if the masks do not fit; or if ranks do not hold the same masks.
    """

    def __init__(self, masks: Masks | Mapping[str, Tensor]) -> None:
        super().__init__()
        self._given = masks if isinstance(masks, Masks) else Masks(masks)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After weights and optimizer have been restored, before the first batch."""
        mine = self._given.hash()
        first = trainer.strategy.broadcast(mine)
        if first != mine:
            raise ValueError(f"rank {trainer.global_rank} holds mask {mine[:12]}, rank 0 {first[:12]}: share one mask")
        self._mask(trainer, network_of(pl_module), self._given)
