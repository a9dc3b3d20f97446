"""Parameters, bytes and FLOPs of a model, dense and without masked weights."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prune.accounting.running import ready
from prune.masks import Masks
from prune.masks.memory import memory_span, shared_memory
from prune.pruner import prunable
from workbench.models.matrices import matrices
from workbench.models.wrappers import unwrap


@dataclass(frozen=True)
class Layer:
    """A weight that can be pruned, and its FLOPs in one call of the model.

    Attributes:
        name: name of the parameter.
        shape: its shape.
        kept: number of weights that the masks keep; all without a mask.
        dense_flops: FLOPs of all uses of the weight.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    dense_flops: int

    @property
    def total(self) -> int:
        """Number of weights, kept or not."""
        return torch.Size(self.shape).numel()

    @property
    def density(self) -> float:
        """Kept over total, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparse_flops(self) -> int:
        """FLOPs of the kept weights alone: ``dense_flops`` times the density."""
        return self.dense_flops * self.kept // self.total


@dataclass(frozen=True)
class Account:
    """Parameters, bytes and FLOPs of a model. ``print`` it for a table.

    FLOPs are those of one call on the example inputs, a multiply-add counted as 2: matrix products, convolutions and
    attention; no biases, norms, activations or look-ups.

    Attributes:
        layers: the weights that can be pruned or have a mask, in definition order.
        parameters: number of all parameters, shared ones once.
        dense_flops: FLOPs with every weight multiplied.
        dense_bytes: bytes of parameters and persistent buffers in their dtypes.
        fp32_bytes: the same with all floating-point values in fp32.
        packed_bytes: ``dense_bytes``, but masked weights as one bit a position and the kept values.
    """

    layers: tuple[Layer, ...]
    parameters: int
    dense_flops: int
    dense_bytes: int
    fp32_bytes: int
    packed_bytes: int

    @property
    def prunable(self) -> int:
        """Weights of all ``layers``."""
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        """Kept weights of all ``layers``."""
        return sum(layer.kept for layer in self.layers)

    @property
    def prunable_density(self) -> float:
        """Kept over prunable weights."""
        return self.kept / self.prunable

    @property
    def model_density(self) -> float:
        """Kept over all parameters; parameters without a mask are kept."""
        return (self.parameters - self.prunable + self.kept) / self.parameters

    @property
    def stored_density(self) -> float:
        """Packed over dense bytes; above 1 if a bit a position costs more than pruning saves."""
        return self.packed_bytes / self.dense_bytes

    @property
    def sparse_flops(self) -> int:
        """FLOPs if only kept weights were multiplied: in theory, because dense storage multiplies zeros, too."""
        return self.dense_flops - sum(layer.dense_flops - layer.sparse_flops for layer in self.layers)

    @property
    def real_flops(self) -> int:
        """FLOPs that this model executes: all ``dense_flops``. To execute fewer, ``shrink`` it."""
        return self.dense_flops

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One line a layer, then the totals, each under the name of its denominator."""
        head = ("weight", "shape", "kept", "of", "density", "FLOPs", "sparse FLOPs")
        rows = [
            (
                *(each.name, "x".join(map(str, each.shape)), f"{each.kept:,}", f"{each.total:,}"),
                *(f"{each.density:.2%}", f"{each.dense_flops:,}", f"{each.sparse_flops:,}"),
            )
            for each in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
        kept = self.parameters - self.prunable + self.kept
        stored = f"{self.packed_bytes:,} packed of {self.dense_bytes:,} dense, {self.stored_density:.2%}"
        return "\n".join(
            [
                *lines,
                f"prunable weights  {self.kept:,} of {self.prunable:,} kept, {self.prunable_density:.2%}",
                f"all parameters    {kept:,} of {self.parameters:,} kept, {self.model_density:.2%}",
                f"bytes             {stored}; {self.fp32_bytes:,} in fp32",
                f"FLOPs a call      {self.dense_flops:,} dense, {self.sparse_flops:,} sparse in theory, "
                f"{self.real_flops:,} real",
            ]
        )


def account(model: nn.Module, example_inputs: Any, masks: Masks | None = None) -> Account:
    """Count parameters, bytes and FLOPs of ``model``, which is run once, in eval mode, and left as it was.

    A weight's FLOPs are those of every product that it is part of, in any module. Products in another precision than
    the weight is stored in (autocast) count in the total, but not for the weight.

    Args:
        model: on any device.
        example_inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments; moved to the model's device.
        masks: which weights are kept, by name. None for all, zeros included.

    Raises:
        ValueError: if the model has no prunable weight, or masks do not fit it.
    """
    model = unwrap(model)  # compiled code hides its operators
    stored = None if masks is None else masks.stored_bytes(model)
    groups = shared_memory(model)
    first = {name: group[0][0] for group in groups for name, _ in group}
    kept = {first[name]: int(mask.sum()) for name, mask in (masks or {}).items()}
    named = prunable(model).keys() | kept.keys()
    weights = {group[0][0]: group[0][1] for group in groups if group[0][0] in named}
    total, flops_of = _flops(model, example_inputs, weights)
    stored_once = [max((parameter for _, parameter in group), key=Tensor.numel) for group in groups]
    everything = [*stored_once, *_persistent_buffers(model)]
    dense = sum(tensor.nbytes for tensor in everything)
    return Account(
        layers=tuple(
            Layer(name, tuple(weight.shape), kept.get(name, weight.numel()), flops_of[name])
            for name, weight in weights.items()
        ),
        parameters=sum(parameter.numel() for parameter in stored_once),
        dense_flops=total,
        dense_bytes=dense,
        fp32_bytes=sum(4 * each.numel() if each.is_floating_point() else each.nbytes for each in everything),
        packed_bytes=dense if stored is None else dense - stored.dense + stored.sparse,
    )


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers of the state dict, each once."""
    buffers = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return list(buffers.values())


def _flops(model: nn.Module, example_inputs: Any, weights: Mapping[str, nn.Parameter]) -> tuple[int, dict[str, int]]:
    """FLOPs of one call, and of each weight."""
    fast = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it runs a whole layer as one operator, which has no formula
        computed = {name for name, matrix in matrices(model).items() if matrix.made_by is not None}
        by_weight = _FlopsByWeight(counter, weights, computed)
        with ready(model, example_inputs) as forward, counter, by_weight:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops(), by_weight.flops


class _FlopsByWeight(TorchDispatchMode):
    """Adds the FLOPs that ``counter`` counts for an operator to the weights that its arguments are views of.

    Arguments are compared by memory, because a module may pass a transpose or slice of its weight. Several weights of
    one operator, as of a recurrent layer, share its FLOPs by their sizes. What a parametrization computes from a weight
    counts as the weight.
    """

    def __init__(
        self, counter: FlopCounterMode, weights: Mapping[str, nn.Parameter], computed: Collection[str]
    ) -> None:
        super().__init__()
        self.counter, self.flops = counter, dict.fromkeys(weights, 0)
        self._sizes = {name: weight.numel() for name, weight in weights.items()}
        self._spans = [(name, memory_span(weight)) for name, weight in weights.items()]
        self._computed = set(computed)
        self._products: list[Tensor] = []  # kept until the end: freed memory would be another tensor's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        names = self._weights_in((args, kwargs))
        if flops := self.counter.get_total_flops() - before:
            total = sum(self._sizes[name] for name in names)
            for name in names:
                self.flops[name] += flops * self._sizes[name] // total
        for name in names & self._computed:
            self._follow(name, result)
        return result

    def _follow(self, name: str, result: Any) -> None:
        """Take what is computed from a weight, and is as large, for the weight."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() == self._sizes[name] and not self._weights_in(tensor):
                self._products.append(tensor)
                self._spans.append((name, memory_span(tensor)))

    def _weights_in(self, arguments: Any) -> set[str]:
        names: set[str] = set()
        for argument in tree_leaves(arguments):
            if isinstance(argument, Tensor):
                device, storage, start, _ = memory_span(argument)
                names |= {n for n, span in self._spans if span[:2] == (device, storage) and span[2] <= start < span[3]}
        return names


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    *batch, length, width = query
    return 2 * torch.Size(batch).numel() * length * key[-2] * (width + value[-1])


def _recurrent(inputs: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    weights = [weights, args[0]] if not isinstance(weights[0], (tuple, list, torch.Size)) else weights
    return 2 * torch.Size(inputs[:-1]).numel() * sum(torch.Size(each).numel() for each in weights if len(each) > 1)


def _bilinear(one: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * one[0] * torch.Size(weight).numel()


def _grouped(inputs: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Of experts: each row of inputs is multiplied by the matrix of one of them."""
    return 2 * inputs[0] * weights[-2] * weights[-1]


_UNCOUNTED = {
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._trilinear: _bilinear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten._cudnn_rnn: _recurrent,
}
"""Formulas for operators that torch's table lacks, by the shapes of their arguments."""
