"""What activation modules are given and give: units that are dead, and how far gates are open.

A site is an activation module behind a layer: one that is used behind several layers is a site behind each of them,
named ``act(layer)``. Found are the modules that ``workbench.models.activations.kind_of`` knows, transformers' too;
what is written as a function in a ``forward`` cannot be seen. Units are the channels of what follows a convolution, the
features of all else. Padding does not count, where a batch has an ``attention_mask``. The network is in eval mode.

Legend: P positions seen, U units.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from workbench.distributed.ranks import world_size
from workbench.models.activations import kind_of
from workbench.models.forward import all_reduce_sum, batches, forward, preserve_state, total_batches
from workbench.models.positions import tokens_of
from workbench.models.wrappers import named_modules

Run = Callable[[nn.Module, Any], Any]
Site = tuple[str, str]  # names of the activation and of the layer before it
Look = Callable[[Site, nn.Module, Tensor], None]
T = TypeVar("T")


def dead_units(
    network: nn.Module, loader: Iterable[Any], run: Run = forward, tolerance: float = 1e-3
) -> dict[str, dict[str, int]]:
    """How many units of each activation are constant over all data seen.

    A unit is dead if max - min of its output is at most ``tolerance`` times the root mean square of all outputs of its
    site: always 0 behind ReLU, always near -0 behind GELU, always near 1 or -1 behind tanh. So smooth and piecewise
    activations are held to one definition. Called on every rank, whose batches are put together.

    Args:
        network: Looked at in eval mode; not changed.
        loader: Batches, read once and not kept.
        run: Passes a batch through the network; by default a mapping without its labels, the first of a tuple, or a
            tensor.
        tolerance: 0 or more.

    Returns:
        Site -> ``dead``, ``zero`` (those of them that are exactly 0 always) and ``units``; empty without sites. Sites
        whose number of units changes from call to call are left out.

    Raises:
        ValueError: If there is no batch, or only one position, where everything is constant.

    Source: Lu, Shin, Su, Karniadakis, "Dying ReLU and Initialization", 2019, arXiv:1903.06733, for a network that is a
    constant function.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}: give 0 or more")
    seen: dict[Site, list[Tensor] | None] = {}

    def look(site: Site, _: nn.Module, outputs: Tensor) -> None:
        new = [
            outputs.amin(0),
            outputs.amax(0),
            _double(outputs).square().sum(),
            outputs.new_tensor(float(len(outputs))),
        ]
        old = seen.setdefault(site, new)
        if old is not None and old is not new:
            seen[site] = None if len(old[0]) != len(new[0]) else _joined(old, new)

    _observe(network, loader, run, look, outputs=True)
    counts = {}
    for site, of in _named({site: _shared(of) for site, of in seen.items() if of is not None}).items():
        low, high, squares, positions = of
        if positions < 2:
            raise ValueError(f"'{site}' was seen at one position, where everything is constant: give more samples")
        scale = (squares / (positions * len(low))).sqrt()
        dead, zero = high - low <= tolerance * scale, (low == 0) & (high == 0)
        counts[site] = {"dead": int(dead.sum()), "zero": int(zero.sum()), "units": len(low)}
    return counts


def gate_statistics(network: nn.Module, loader: Iterable[Any], run: Run = forward) -> dict[str, dict[str, Any]]:
    """Moments of each activation's slope f'(z) over all data seen, and of the pre-activation z itself.

    ``workbench.models.activations.gate(kind, mean, std)`` gives what they would be, were z Gaussian. Arguments as for
    :func:`dead_units`.

    Returns:
        Site -> ``kind`` (the row of the table), ``mean`` and ``std`` of z, ``slope``, E f'(z), and ``slope_squared``,
        E f'(z)^2: what the gate does to a squared gradient.

    Raises:
        ValueError: If there is no batch.
    """
    sums: dict[Site, Tensor] = {}
    kinds: dict[Site, str | None] = {}

    def look(site: Site, module: nn.Module, inputs: Tensor) -> None:
        with torch.enable_grad():
            z = inputs.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(module.forward(z + 0).sum(), z)  # in place only on the sum
        z, slope = _double(z), _double(slope)
        row = torch.stack((z.sum(), z.square().sum(), slope.sum(), slope.square().sum(), torch.ones_like(z).sum()))
        sums[site] = sums.get(site, torch.zeros_like(row)) + row
        kinds[site] = kind_of(module)

    _observe(network, loader, run, look, outputs=False)
    all_reduce_sum(sums.values())
    return _named({site: _moments(kinds[site], row) for site, row in sums.items()})


def _moments(kind: str | None, row: Tensor) -> dict[str, Any]:
    mean, squared, slope, slope_squared = (row[:4] / row[4]).tolist()
    deviation = max(0.0, squared - mean * mean) ** 0.5
    return {"kind": kind, "mean": mean, "std": deviation, "slope": slope, "slope_squared": slope_squared}


def _observe(network: nn.Module, loader: Iterable[Any], run: Run, look: Look, outputs: bool) -> None:
    """Let ``look`` see what every activation is given, or gives, [P, U], on all batches."""
    home, count, tokens, behind = next(network.parameters(), torch.empty(0)).device, 0, None, ("", -1)

    def passed(name: str, dims: int, *_: Any) -> None:
        nonlocal behind
        behind = name, dims

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        after(name, module, args, args[0] if args else next(iter(kwargs.values())))

    def after(name: str, module: nn.Module, _: Any, value: Tensor) -> None:
        if (rows := _rows(value.detach(), behind[1], tokens)).numel():
            look((name, behind[0]), module, rows)

    with preserve_state(network, training=False), torch.no_grad(), ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, which calls no activation
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has none of these hooks
        for name, module in named_modules(network):
            if kind_of(module) is not None and outputs:
                stack.callback(module.register_forward_hook(partial(after, name)).remove)
            elif kind_of(module) is not None:
                stack.callback(module.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
            elif (dims := _dims(module)) is not None:
                stack.callback(module.register_forward_hook(partial(passed, name, dims)).remove)
        for batch in batches(loader, home):
            tokens, behind = tokens_of(batch.batch if hasattr(batch, "cached_targets") else batch), ("", -1)
            run(network, batch)
            count += 1
    total_batches(count, home)


def _dims(layer: nn.Module) -> int | None:
    """Axes of a layer's outputs behind that of its units; None of what is no layer."""
    if isinstance(layer, _ConvNd):
        return len(layer.kernel_size)
    return 0 if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" else None


def _rows(value: Tensor, dims: int, tokens: Tensor | None) -> Tensor:
    """[P, U], without padding, in fp32 or better; ``dims`` is that of the layer before, -1 if there is none."""
    value = value if value.dtype == torch.float64 else value.float()
    if tokens is not None and value.ndim > 2 and value.shape[:2] == tokens.shape:
        value = value[tokens]
    elif tokens is not None and value.ndim == 2 and len(value) == tokens.numel():
        value = value[tokens.flatten()]
    elif value.ndim == dims + 2 or (dims < 0 and value.ndim > 3):
        value = value.movedim(1, -1)
    return value.reshape(-1, value.shape[-1] if value.ndim else 1)


def _double(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _joined(one: list[Tensor], two: list[Tensor]) -> list[Tensor]:
    low, high = torch.minimum(one[0], two[0]), torch.maximum(one[1], two[1])
    return [low, high, one[2] + two[2], one[3] + two[3]]


def _shared(of: list[Tensor]) -> list[Tensor]:
    """The same, of all ranks together."""
    if world_size() > 1:
        torch.distributed.all_reduce(of[0], torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(of[1], torch.distributed.ReduceOp.MAX)
        all_reduce_sum(of[2:])
    return of


def _named(sites: dict[Site, T]) -> dict[str, T]:
    """By the activation's name, and the layer's where it is behind several."""
    uses = Counter(name for name, _ in sites)
    return {name if uses[name] == 1 else f"{name}({layer})": value for (name, layer), value in sites.items()}
