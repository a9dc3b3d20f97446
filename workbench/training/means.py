"""Weighted means over valid positions: of logged values over batches, of gradients over micro-batches and ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.distributed.ranks import all_gather, world_size


@final
class Means:
    """Weighted means of named values over many batches, summed in fp64 without synchronising the device.

    Logging total batch through Lightning takes a quarter of a small network's step, and loses the batches before a
    checkpoint in the middle of an epoch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add ``values``, scalars that are means over ``weight`` positions, a scalar.

        A mean over no position is left out, whatever it is: torch's cross-entropy makes it NaN.
        """
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        weight = weight.to(dtype)
        for name, value in values.items():
            row = torch.stack((value.detach().to(dtype).where(weight > 0, 0.0) * weight, weight))
            # Not in place: tensors made in inference mode, as in validation, cannot be updated outside of it.
            self._sums[name] = self._sums[name] + row if name in self._sums else row

    def log(self, module: Any, prefix: str = "") -> None:
        """Log the means over all batches of all ranks, from a hook of ``module`` or of a callback."""
        for name, (total, weight) in self.local().items():
            mean = total / weight if weight else 0.0
            # The weight stays a float: Lightning 2.6 averages integer ones over ranks and rounds down.
            module.log(f"{prefix}{name}", mean, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def reset(self) -> None:
        """Remove all sums."""
        self._sums = {}

    def local(self) -> dict[str, list[float]]:
        """This rank's [sum of value * weight, sum of weight] by name."""
        return {name: row.tolist() for name, row in self._sums.items()}

    def state(self) -> list[dict[str, list[float]]]:
        """The sums of total rank, for a checkpoint. Called on every rank."""
        return all_gather(self.local())

    def restore(self, states: Sequence[Mapping[str, Sequence[float]]], rank: int, world_size: int) -> None:
        """Restore a checkpoint's ``state``; with another number of ranks, rank 0 takes all sums."""
        own = [states[rank]] if len(states) == world_size else states if rank == 0 else []
        self.reset()
        for state in own:
            for name, row in state.items():
                before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
                self._sums[name] = before + torch.tensor(row, dtype=torch.float64)


@final
class GlobalMean:
    """Makes the gradient of an update the mean over all valid positions of its micro-batches and ranks.

    Lightning averages the gradients of micro-batches, and data-parallel strategies those of ranks, with equal weights.
    Here a loss is weighted by its share of positions. The total of an update is only known at its last micro-batch: so
    each loss is scaled by a provisional divisor, and the gradient is corrected once before the update.
    """

    def __init__(self) -> None:
        self._divisor: Tensor | None = None
        self._total: Tensor | None = None
        self._largest = torch.ones(())

    def scale_loss(self, loss: Tensor, count: Tensor, trainer: Any) -> Tensor:
        """``loss``, a mean over ``count`` positions or weights, times its share of the update. Called on every rank."""
        ranks = world_size()
        if ranks == 1 and trainer.accumulate_grad_batches == 1:
            return loss
        local = count.to(torch.float32)
        total = local.clone()
        if ranks > 1:
            torch.distributed.all_reduce(total)
        if self._divisor is None or self._total is None:
            # The largest count so far: with a small divisor the later losses would overflow half precision.
            self._largest = torch.maximum(self._largest.to(total.device), total)
            self._divisor = self._largest if trainer.accumulate_grad_batches > 1 else _divisor(total)
            self._total = total
        else:
            self._total = self._total + total
        return loss * (ranks * local / self._divisor)

    def scale_gradients(self, parameters: Iterable[nn.Parameter], trainer: Any) -> None:
        """Correct the gradients of an update, before clipping; the next micro-batch starts another update."""
        divisor, total, self._divisor, self._total = self._divisor, self._total, None, None
        if divisor is None or total is None or trainer.accumulate_grad_batches == 1:
            return
        factor = trainer.accumulate_grad_batches * divisor / _divisor(total)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _divisor(total: Tensor) -> Tensor:
    """The total, which may be a small sum of weights; 1 where nothing counts."""
    return torch.where(total > 0, total, 1.0)
