"""What a training of a hunt has come to: dead units and gradient flow."""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from workbench.diagnostics import dead_units, gradient_flow
from workbench.distributed.ranks import world_size
from workbench.training.calibration import FirstBatches, TrainingLoss, batch_runner
from workbench.training.loop import training_loader
from workbench.training.module import network_of

BATCHES = 8
"""Training batches that a network is looked at with."""


def studied(
    module: LightningModule, data: LightningDataModule, masks: Mapping[str, Tensor], seed: int
) -> dict[str, Any]:
    """Dead units and gradient flow of the module's network as it is, on a few training batches, for a record.

    Returns:
        ``units`` (all), ``dead`` and ``zero`` (of those), and ``gradient_flow``, with ``gradient_ratio``, as
        :mod:`workbench.diagnostics` has them. Empty where weights are sharded, a family is trained, the module
        steps by hand, or, with a warning, where its ``training_step`` cannot be called outside of a fit.
    """
    network = network_of(module)
    if getattr(module, "family", ()) or any(isinstance(weight, DTensor) for weight in network.parameters()):
        return {}
    if not module.automatic_optimization:
        return {}
    try:
        shown = FirstBatches(training_loader(module, data, seed), BATCHES, module, data)
        units = dead_units(network, shown, batch_runner(module)).values()
        flow = gradient_flow(network, shown, TrainingLoss(module), masks)
    except Exception as error:  # of a module or data of one's own: what was trained is kept all the same
        if world_size() > 1:
            raise
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"dead units and gradient flow are not in the record, {said}", stacklevel=2)
        return {}
    found = {word: sum(row[word] for row in units) for word in ("units", "dead", "zero")}
    return {**found, "gradient_flow": flow["total"], "gradient_ratio": flow["ratio"]}
