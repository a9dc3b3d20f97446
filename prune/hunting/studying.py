"""What a training of a hunt has come to: dead units and gradient flow."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from workbench.diagnostics import dead_units, gradient_flow
from workbench.evidence import FirstBatches, Loss, runs
from workbench.module import network_of
from workbench.training import training_loader

BATCHES = 8
"""Training batches that a network is looked at with."""


def studied(
    module: LightningModule, data: LightningDataModule, masks: Mapping[str, Tensor], seed: int
) -> dict[str, Any]:
    """Dead units and gradient flow of the module's network as it is, on a few training batches, for a record.

    Returns:
        ``units`` (all), ``dead`` and ``zero`` (of those), and ``gradient_flow``, with ``gradient_ratio``, as
        :mod:`workbench.diagnostics` has them. Empty where weights are sharded or a family is trained; without
        ``gradient_flow`` where the module steps by hand.
    """
    network = network_of(module)
    if getattr(module, "family", ()) or any(isinstance(weight, DTensor) for weight in network.parameters()):
        return {}
    shown = FirstBatches(training_loader(module, data, seed), BATCHES, module, data)
    units = dead_units(network, shown, runs(module)).values()
    found: dict[str, Any] = {word: sum(row[word] for row in units) for word in ("units", "dead", "zero")}
    if module.automatic_optimization:
        flow = gradient_flow(network, shown, Loss(module), masks)
        found |= {"gradient_flow": flow["total"], "gradient_ratio": flow["ratio"]}
    return found
