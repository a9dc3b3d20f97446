"""Which layers alone the inputs of other layers are computed from.

A constant unit can be folded into the next bias only if nothing else joins it on the way: an input of the network, a
mask or a sum over positions would make its value depend on the data. The dependency graph does not tell, because it
follows channels and not values. So a forward pass is run in a dispatch mode that keeps, for every tensor, the set of
layers that it is a function of::

    layer output ──► {layer}            parameters, buffers ──► {}          anything else ──► None (unknown)
    pointwise, view, pool, norm of single channels of known tensors ──► union of their sets; None if one is None
    softmax ──► ATTENTION, and attention @ values ──► the set of the values, because its weights sum to 1

Sets are kept by storage and not by tensor, so that views and in-place operations need no separate rules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune.shrinking.equivalence import Call
from workbench.models.resize import axes, is_channelwise

Producers = frozenset[str] | None  # paths of layers; None if something else joins in

_POINTWISE = """
    relu gelu silu elu celu leaky_relu hardswish hardsigmoid hardtanh tanh sigmoid softplus mish threshold softshrink
    hardshrink log_sigmoid_forward _prelu_kernel exp log log1p expm1 sqrt rsqrt neg abs sign square pow reciprocal clamp
    clamp_min clamp_max erf sin cos rsub add sub mul div maximum minimum glu
"""
_VIEWS_AND_COPIES = """
    _to_copy clone detach alias view _unsafe_view reshape t transpose permute expand squeeze unsqueeze slice select
    split split_with_sizes unbind cat stack
"""
_POOLING_AND_NORMS = """
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training native_group_norm mean
    amax amin max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d
"""
# Operators that make a constant of constants, at every position.
_CONSTANT_PRESERVING = frozenset(f"{_POINTWISE} {_VIEWS_AND_COPIES} {_POOLING_AND_NORMS}".split())
_ATTENTION = frozenset({"*"})  # marks attention weights, which sum to 1 over the last axis


def producers_of(model: nn.Module, layers: Sequence[str], call: Call) -> dict[str, Producers]:
    """Layer -> the layers whose outputs its input is a function of, and of nothing else.

    Args:
        model: in eval mode.
        layers: paths of the consuming layers.
        call: what to call the model with.

    Returns:
        Layers that are called, each with its producers; None where something else joins in, such as an input of the
        network, a mask, or a sum over positions.
    """
    mode = _ProducersMode()
    for tensor in (*model.parameters(), *model.buffers()):
        mode.record(tensor, frozenset())
    inputs: dict[str, Producers] = {}

    def note_input(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            now, before = mode.producers(args[0]), inputs.get(name, frozenset())
            inputs[name] = None if now is None or before is None else before | now

        return hook

    def mark_output(name: str, replaces: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            # A norm or depthwise convolution keeps channels apart: its output is still of the layers before it.
            before = frozenset() if replaces else mode.producers(args[0])
            mode.record(out, None if before is None else before | {name})

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note_input(name)) for name in layers]
    for name, module in model.named_modules():
        if axes(module) is not None:
            hooks.append(module.register_forward_hook(mark_output(name, not is_channelwise(module))))
    try:
        with torch.no_grad(), mode:
            call.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


class _ProducersMode(TorchDispatchMode):
    """Follows which layers tensors are computed from, storage by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._producers: dict[int, Producers] = {}
        # Tensors are kept until the end: a freed storage would give its address, with its set, to another one.
        self._tensors: list[Tensor] = []

    def record(self, tensor: Tensor, producers: Producers) -> None:
        """Set the producers of a tensor and of its views."""
        self._tensors.append(tensor)
        self._producers[tensor.untyped_storage()._cdata] = producers

    def producers(self, tensor: Tensor) -> Producers:
        return self._producers.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        producers = self._propagate(func._schema.name.rpartition("::")[2], args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.record(tensor, producers)
        return out

    def _propagate(self, operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Producers:
        if operator.startswith("_scaled_dot_product"):
            return self.producers(args[2])
        if operator in ("_softmax", "_safe_softmax"):
            return _ATTENTION if args[1] in (-1, args[0].dim() - 1) else None
        if operator == "bmm" and self.producers(args[0]) == _ATTENTION:
            sums = args[0].sum(-1)  # dropout or a mask after the softmax may have changed them
            return self.producers(args[1]) if torch.allclose(sums, torch.ones_like(sums)) else None
        operator = operator.removesuffix("_")
        if operator not in _CONSTANT_PRESERVING or (operator.startswith("avg_pool") and _changes_border(*args[3:])):
            return None
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        sets = [self.producers(tensor) for tensor in tensors if tensor.numel()]  # a cache begins empty
        producers = [each for each in sets if each is not None]
        return frozenset().union(*producers) if producers and len(producers) == len(sets) else None


def _changes_border(padding: Any = 0, ceil: bool = False, counts: bool = True, divisor: int | None = None) -> bool:
    """Whether average pooling of a constant gives another value at the border, where it averages padding too."""
    return divisor is not None or (counts and any(padding if isinstance(padding, (list, tuple)) else (padding,)))
