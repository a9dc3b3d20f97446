"""Dead units and gradient flow of a trained level."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from prune.tickets.subject import Subject
from workbench.diagnostics import dead_units, gradient_flow
from workbench.distributed.ranks import world_size
from workbench.training.calibration import FirstBatches, TrainingLoss, batch_runner
from workbench.training.loop import training_loader

BATCHES = 8
"""Training batches that the diagnosis runs on."""


def diagnose(of: Subject, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dead units and gradient flow of the network as it is, on a few training batches, for a record.

    Returns:
        ``units`` (all), ``dead`` and ``zero`` (of those), and ``gradient_flow``, with ``gradient_ratio``, as
        :mod:`workbench.diagnostics` has them. Empty where weights are sharded, a family is trained, the module
        steps by hand, or, with a warning, where its ``training_step`` cannot be called outside of a fit.
    """
    module, network = of.module, of.network
    if getattr(module, "family", ()) or any(isinstance(weight, DTensor) for weight in network.parameters()):
        return {}
    if not module.automatic_optimization:
        return {}
    try:
        batches = FirstBatches(training_loader(module, of.data, of.seed), BATCHES, module, of.data)
        units = dead_units(network, batches, batch_runner(module)).values()
        flow = gradient_flow(network, batches, TrainingLoss(module), masks)
    except Exception as error:  # raised by the user's module or data: the level is trained, and is kept without
        if world_size() > 1:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"dead units and gradient flow are not in the record, {reason}", stacklevel=2)
        return {}
    counts = {word: sum(row[word] for row in units) for word in ("units", "dead", "zero")}
    return {**counts, "gradient_flow": flow["total"], "gradient_ratio": flow["ratio"]}
