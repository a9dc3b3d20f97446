"""Means over everything that counts: of logged numbers over batches, of gradients over micro-batches and ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from workbench.distributed.ranks import everyone, world


@final
class Means:
    """Weighted means of named numbers over many batches, summed in fp64 without waiting for the device.

    Logging every batch through Lightning took a quarter of a small network's step, and forgot what came before a
    checkpoint in the middle of an epoch.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        """Count ``values``, scalars that are means over ``weight`` positions, a scalar."""
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        weight = weight.to(dtype)
        for name, value in values.items():
            row = torch.stack((value.detach().to(dtype) * weight, weight))
            # Not in place: validation makes tensors in inference mode, which may not be updated outside of it.
            self._sums[name] = self._sums[name] + row if name in self._sums else row

    def log(self, module: Any, prefix: str = "") -> None:
        """Log the means over all batches of all ranks, from a hook of ``module`` or of a callback."""
        for name, (total, weight) in self.local().items():
            mean = total / weight if weight else 0.0
            # The weight stays a float: Lightning 2.6 averages integer ones over ranks and rounds down.
            module.log(f"{prefix}{name}", mean, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def reset(self) -> None:
        """Start anew."""
        self._sums = {}

    def local(self) -> dict[str, list[float]]:
        """This rank's [sum of value * weight, sum of weight] by name."""
        return {name: row.tolist() for name, row in self._sums.items()}

    def state(self) -> list[dict[str, list[float]]]:
        """What every rank has, for a checkpoint. Called on every rank."""
        return everyone(self.local())

    def restore(self, states: Sequence[Mapping[str, Sequence[float]]], rank: int, world: int) -> None:
        """Go on from a checkpoint's ``state``; with another number of ranks, rank 0 takes it all."""
        mine = [states[rank]] if len(states) == world else states if rank == 0 else []
        self.reset()
        for state in mine:
            for name, row in state.items():
                before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
                self._sums[name] = before + torch.tensor(row, dtype=torch.float64)


@final
class GlobalMean:
    """Makes the gradient of an update the mean over all valid positions of its micro-batches and ranks.

    Lightning averages the gradients of micro-batches, and data-parallel strategies those of ranks, whatever each of
    them held. Here a loss is weighed by its share of positions. How many an update will have in all is only known at
    its last micro-batch, so each is weighed against some number, and the gradient is set right once before the update.
    """

    def __init__(self) -> None:
        self._unit: Tensor | None = None
        self._total: Tensor | None = None
        self._largest = torch.ones(())

    def weigh(self, loss: Tensor, count: Tensor, trainer: Any) -> Tensor:
        """``loss``, a mean over ``count`` positions, by its share of the update so far. Called on every rank."""
        ranks = world()
        if ranks == 1 and trainer.accumulate_grad_batches == 1:
            return loss
        mine = count.to(torch.float32)
        every = mine.clone()
        if ranks > 1:
            torch.distributed.all_reduce(every)
        if self._unit is None or self._total is None:
            # Of several, against the largest so far: after a first one with hardly any, half precision would overflow.
            self._largest = torch.maximum(self._largest.to(every.device), every)
            self._unit = self._largest if trainer.accumulate_grad_batches > 1 else every.clamp(min=1)
            self._total = every
        else:
            self._total = self._total + every
        return loss * (ranks * mine / self._unit)

    def settle(self, parameters: Iterable[nn.Parameter], trainer: Any) -> None:
        """Set the gradients right before they are clipped and used; the next micro-batch starts anew."""
        unit, total, self._unit, self._total = self._unit, self._total, None, None
        if unit is None or total is None or trainer.accumulate_grad_batches == 1:
            return
        factor = trainer.accumulate_grad_batches * unit / total.clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
