"""Scores are computed in float32, so that two networks differ by what they are and not by how they were computed."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_HALF = (torch.float16, torch.bfloat16)


def widen(module: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Makes parameters and buffers in half precision float32, which is exact; returns them with what they were."""
    half = [(each, each.dtype) for each in (*module.parameters(), *module.buffers()) if each.dtype in _HALF]
    _retype([(tensor, torch.float32) for tensor, _ in half])
    return half


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers in half precision are float32; afterwards as they were."""
    half = widen(module)
    try:
        yield
    finally:
        _retype(half)


@contextmanager
def scored_in_float32(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Inside, the trainer validates and tests in float32, whatever precision it trains in.

    A precision of 64 bits stays. Where weights are sharded in half precision, or a strategy or plugin computes in a
    precision of its own, scores stay in that, with a warning.
    """
    strategy, plugin = trainer.strategy, trainer.precision_plugin
    sharded = any(isinstance(each, DTensor) and each.dtype in _HALF for each in module.parameters())
    plain = type(plugin) is Precision or isinstance(plugin, HalfPrecision | MixedPrecision)
    if sharded or (not plain and not str(plugin.precision).startswith(("32", "64"))):
        warnings.warn(
            f"scores are computed in {plugin.precision}, as {type(strategy).__name__} has it, those of other stages in "
            "float32: a small difference may be that of the precision",
            stacklevel=3,
        )
        yield
        return
    if not plain:
        yield
        return
    strategy.precision_plugin = Precision()
    try:
        with in_float32(module):
            yield
    finally:
        strategy.precision_plugin = plugin


def _retype(tensors: Iterable[tuple[Tensor, torch.dtype]]) -> None:
    for tensor, kind in tensors:
        gradient, tensor.grad = tensor.grad, None
        tensor.data = tensor.data.to(kind)
        tensor.grad = None if gradient is None else gradient.to(kind)
