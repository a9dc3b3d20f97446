"""Evaluating one network at several points of weight space, without changing it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.models.forward import all_reduce_sum, batches, forward, total_batches
from workbench.randomness import same_random_state

Run = Callable[[nn.Module, Any], Any]


@contextmanager
def temporary_states(
    network: nn.Module, recalibrate: Iterable[Any] | None = None, run: Run = forward
) -> Iterator[Callable[[Mapping[str, Tensor]], nn.Module]]:
    """Yields ``load(state)``, which loads a state into the network and returns the network.

    Afterwards, also after an exception, the network's weights, buffers and modes are as they were, in the same memory.

    Example:
        >>> with temporary_states(network, recalibrate=batches) as load:
        ...     result = barrier(lambda state: error(load(state)), a, b)

    Args:
        network: Of the architecture that the states are of.
        recalibrate: Batches that the statistics of batch norms are estimated on after every load, read anew each time.
            None keeps those of the state: interpolated statistics are those of neither network.
        run: Passes a batch through the network.

    Raises:
        ValueError: On a load, if the state does not fit the network, or there is no batch for its batch norms.

    Source: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", 2022, arXiv:2211.08403; Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", 2018, arXiv:1803.05407, section 3.1.
    """
    before = {n: value.clone() if isinstance(value, Tensor) else value for n, value in network.state_dict().items()}
    modes = {module: module.training for module in network.modules()}

    def load(state: Mapping[str, Tensor]) -> nn.Module:
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"the state does not fit {type(network).__name__} ({error}): give a state dict of this network"
            ) from error
        if recalibrate is not None:
            recalibrate_batch_norms(network, recalibrate, run)
        return network

    try:
        yield load
    finally:
        network.load_state_dict(before)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def recalibrate_batch_norms(network: nn.Module, loader: Iterable[Any], run: Run = forward) -> int:
    """Estimate the running statistics of batch norms anew, in place: plain means over the batches.

    As ``torch.optim.swa_utils.update_bn``, but with everything else in eval mode, so that dropout draws nothing. Every
    batch of every rank has the same weight; called on every rank. Modes and the random state stay.

    Args:
        network: With or without batch norms.
        loader: Batches; not read if there is no batch norm.
        run: Passes a batch through the network.

    Returns:
        The number of batch norms.

    Raises:
        ValueError: If there are batch norms and no batches.
    """
    norms = batch_norms(network)
    if not norms:
        return 0
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    device, count = next(network.buffers()).device, 0
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with same_random_state():
            for batch in batches(loader, device):
                run(network, batch)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    batches_of_all_ranks = total_batches(count, device)
    if batches_of_all_ranks != count:
        statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        all_reduce_sum([each.mul_(count / batches_of_all_ranks) for each in statistics if each is not None])
    return len(norms)


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [each for each in network.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
