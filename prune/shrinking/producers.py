"""Which layers alone the inputs of others are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune.shrinking.equivalence import Call
from workbench.models.resize import axes, is_channelwise

Makers = frozenset[str] | None

_POINTWISE = """
    relu gelu silu elu celu leaky_relu hardswish hardsigmoid hardtanh tanh sigmoid softplus mish threshold softshrink
    hardshrink log_sigmoid_forward _prelu_kernel exp log log1p expm1 sqrt rsqrt neg abs sign square pow reciprocal clamp
    clamp_min clamp_max erf sin cos rsub add sub mul div maximum minimum glu
"""
_MOVING = """
    _to_copy clone detach alias view _unsafe_view reshape t transpose permute expand squeeze unsqueeze slice select
    split split_with_sizes unbind cat stack
"""
_POOLING = """
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training native_group_norm mean
    amax amin max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d
"""
_KEEPING = frozenset(f"{_POINTWISE} {_MOVING} {_POOLING}".split())
_SOFTMAX = frozenset({"*"})


def makers_of(model: nn.Module, layers: Sequence[str], call: Call) -> dict[str, Makers]:
    """Layer -> the layers whose outputs what it reads is a function of, and of nothing else.

    Between them may lie what treats every position alike or averages over positions: activations, sums and products,
    norms of single channels, pooling, changes of shape, and attention, whose weights sum to 1. None where something
    else joins in, such as an input of the network, a mask, or a sum over positions.

    Args:
        model: in eval mode.
        layers: paths of those that read.
        call: what to call the model with.
    """
    flow = _Flow()
    for tensor in (*model.parameters(), *model.buffers()):
        flow.put(tensor, frozenset())
    found: dict[str, Makers] = {}

    def read(name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            makers = flow.of(given[0])
            before = found.get(name, frozenset())
            found[name] = None if makers is None or before is None else before | makers

        return look

    def made(name: str, fresh: bool) -> Any:
        def mark(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            before = frozenset() if fresh else flow.of(given[0])
            flow.put(out, None if before is None else before | {name})

        return mark

    hooks = [model.get_submodule(name).register_forward_pre_hook(read(name)) for name in layers]
    for name, module in model.named_modules():
        if axes(module) is not None:
            hooks.append(module.register_forward_hook(made(name, not is_channelwise(module))))
    try:
        with torch.no_grad(), flow:
            call.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Flow(TorchDispatchMode):
    """Follows what tensors are made of, storage by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._makers: dict[int, Makers] = {}
        self._alive: list[Tensor] = []

    def put(self, tensor: Tensor, makers: Makers) -> None:
        """Let a tensor, and its views, be made by these."""
        self._alive.append(tensor)
        self._makers[tensor.untyped_storage()._cdata] = makers

    def of(self, tensor: Tensor) -> Makers:
        """What a tensor is made by."""
        return self._makers.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result."""
        out = func(*args, **(kwargs or {}))
        makers = self._through(func._schema.name.rpartition("::")[2], args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.put(tensor, makers)
        return out

    def _through(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Makers:
        if name.startswith("_scaled_dot_product"):
            return self.of(args[2])
        if name in ("_softmax", "_safe_softmax"):
            return _SOFTMAX if args[1] in (-1, args[0].dim() - 1) else None
        if name == "bmm" and self.of(args[0]) == _SOFTMAX:
            sums = args[0].sum(-1)
            return self.of(args[1]) if torch.allclose(sums, torch.ones_like(sums)) else None
        name = name.removesuffix("_")
        if name not in _KEEPING or (name.startswith("avg_pool") and _sees_less(*args[3:])):
            return None
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        each = [self.of(tensor) for tensor in given if tensor.numel()]  # a cache begins with nothing
        known = [makers for makers in each if makers is not None]
        return frozenset().union(*known) if known and len(known) == len(each) else None


def _sees_less(padding: Any = 0, ceil: bool = False, counts: bool = True, divisor: int | None = None) -> bool:
    """Whether the average of a constant is another one at the border."""
    return divisor is not None or (counts and any(padding if isinstance(padding, (list, tuple)) else (padding,)))
