"""A network that is put at one point of weight space after another, and comes back."""

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
def visiting(
    network: nn.Module, refresh: Iterable[Any] | None = None, run: Run = forward
) -> Iterator[Callable[[Mapping[str, Tensor]], nn.Module]]:
    """Gives ``visit(state)``, which puts the network in that state and returns it.

    Afterwards, also after an exception, the network's weights, buffers and modes are as they were, in the same memory.

    Example:
        >>> with visiting(network, refresh=batches) as visit:
        ...     found = barrier(lambda state: error(visit(state)), a, b)

    Args:
        network: Of the architecture that the states are of.
        refresh: Batches that the statistics of batch norms are estimated on at every visit, read anew each time. None
            leaves them as the state has them: averages of two networks' statistics are those of neither.
        run: Passes a batch through the network.

    Raises:
        ValueError: On a visit, if the state does not fit the network, or a network of batch norms finds no batch.

    Source: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", 2022, arXiv:2211.08403; Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", 2018, arXiv:1803.05407, section 3.1.
    """
    before = {n: value.clone() if isinstance(value, Tensor) else value for n, value in network.state_dict().items()}
    modes = {module: module.training for module in network.modules()}

    def visit(state: Mapping[str, Tensor]) -> nn.Module:
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"the state does not fit {type(network).__name__} ({error}): give a state dict of this network"
            ) from error
        if refresh is not None:
            refresh_statistics(network, refresh, run)
        return network

    try:
        yield visit
    finally:
        network.load_state_dict(before)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def refresh_statistics(network: nn.Module, loader: Iterable[Any], run: Run = forward) -> int:
    """Estimate the running statistics of batch norms anew, in place: plain means over the batches.

    As ``torch.optim.swa_utils.update_bn``, but that all else is in eval mode, so that nothing is drawn by dropout. The
    batches of all ranks count alike; called on every rank. Modes and the random state stay.

    Args:
        network: With or without batch norms.
        loader: Batches; not read if there is no batch norm.
        run: Passes a batch through the network.

    Returns:
        How many batch norms there are.

    Raises:
        ValueError: If there are batch norms and no batches.
    """
    norms = batch_norms(network)
    if not norms:
        return 0
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    home, count = next(network.buffers()).device, 0
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with same_random_state():
            for batch in batches(loader, home):
                run(network, batch)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    everyone = total_batches(count, home)
    if everyone != count:
        statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        sums = [statistic.mul_(count / everyone) for statistic in statistics if statistic is not None]
        all_reduce_sum(sums)
    return len(norms)


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Those that keep running statistics."""
    return [each for each in network.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
