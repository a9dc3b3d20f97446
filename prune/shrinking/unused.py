"""Units that can be removed: those that nothing reads, and those that are constant.

A unit is removable if (1) every column that reads it is zero (*unused*), or (2) it has the same value at every position
of every input (*constant*), and every layer that reads it can take value x column into its bias.

Whether a unit is constant cannot be read off the weights, because anything may happen between producer and consumer. It
is decided in three steps, each of which only removes candidates::

    rows of some producer are all zero     (the cause: what is constant by luck may change with the next input)
      └─► the consumer's input is a function of producing layers alone            (`producers.producers_of`)
            └─► its values are the same over all calls, and again twice after every nonzero row of every producer was
                replaced by a random one, with opposite signs

The random weights prove that nothing *before* the zero rows is needed for the value. With trained weights alone a ReLU
that happens to be off on all the example inputs would look constant. Two signs, because after a ReLU one of them could
be off for every input.

`shrink` proves the removal itself in the same way: with the units' producers random (``randomized``) the outputs must
not change, so nothing reads them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prune.shrinking.architecture import enclosing_config
from prune.shrinking.equivalence import Call
from prune.shrinking.producers import Producers, producers_of
from prune.shrinking.surgery import columns
from prune.shrinking.units import Group, Selection, Slot
from workbench.models.copying import copied
from workbench.models.resize import axes, is_conv1d

_TOLERANCE = 1e-12  # relative, in float64


class Range(NamedTuple):
    """The least and the greatest value of each input of a layer; [inputs] each."""

    low: Tensor
    high: Tensor

    def union(self, other: "Range") -> "Range":
        """The smallest range around both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def is_constant(self) -> Tensor:
        """Which inputs have one value, but for rounding; bool, [inputs]."""
        magnitude = torch.maximum(self.low.abs(), self.high.abs()).clamp(min=1)
        return self.high - self.low <= _TOLERANCE * magnitude

    def is_zero(self) -> Tensor:
        """Which inputs are always 0; bool, [inputs]."""
        return (self.low == 0) & (self.high == 0)


def unused(model: nn.Module, group: Group) -> Tensor:
    """Which units have only zeros in every column that reads them; bool, [units]."""
    zero = torch.ones(len(group), dtype=torch.bool)
    for slot in group.consumers:
        zero &= _all_indices(columns(model, slot).flatten(1).count_nonzero(1) == 0, slot)
    return zero


def constant(model: nn.Module, groups: Sequence[Group], calls: Sequence[Call], folding: bool = True) -> list[Tensor]:
    """Which units have the same value for every input, that every layer reading them can fold.

    A convolution that pads with zeros can only fold the value 0, because it reads less of a constant at the border; so
    can a layer without a bias in a model of transformers, whose ``from_pretrained`` would lose a new one. Without
    ``folding`` every layer folds only the value 0.

    Returns:
        bool, [units], for each of ``groups``.
    """
    candidates = [_has_zero_rows(model, group) for group in groups]
    tested = [Selection(group, mask) for group, mask in zip(groups, candidates) if bool(mask.any())]
    layers = list(dict.fromkeys(slot.layer for group, _ in tested for slot in group.consumers))
    _drop_mixed(model, tested, groups, producers_of(model, layers, calls[0]) if tested else {})
    tested = [each for each in tested if bool(each.mask.any())]
    if not tested:
        return candidates
    everything = [Selection(group, torch.ones_like(mask)) for group, mask in zip(groups, candidates)]
    trained = input_ranges(model, layers, calls)
    plus, minus = (
        input_ranges(randomized(model, everything, sign, nonzero_only=True), layers, calls) for sign in (1, -1)
    )
    foldable = {}
    for layer, values in trained.items():
        fits = values.is_constant() if folding and _folds_any_value(model, layer) else values.is_zero()
        foldable[layer] = fits & plus[layer].union(minus[layer]).is_constant()
    for group, mask in tested:
        for slot in group.consumers:
            mask &= _all_indices(foldable[slot.layer], slot) if slot.layer in foldable else torch.zeros_like(mask)
    return candidates


def _drop_mixed(
    model: nn.Module, tested: Sequence[Selection], groups: Sequence[Group], producers: Mapping[str, Producers]
) -> None:
    """Drop candidates that reach a consumer mixed with something that no layer of its groups produces, in place.

    A depthwise convolution that pads with zeros makes another value of a constant at the border, unless its own rows
    are zero.
    """
    expected: dict[str, set[str]] = {}  # consumer -> all layers that produce what it reads
    for group in groups:
        for slot in group.consumers:
            expected.setdefault(slot.layer, set()).update(producer.layer for producer in group.producers)
    for group, mask in tested:
        own = {slot.layer: slot for slot in group.producers}
        for slot in group.consumers:
            actual = producers.get(slot.layer)
            if actual is None or not actual <= expected[slot.layer]:
                mask.zero_()
                break
            for layer in actual & own.keys():
                module = model.get_submodule(layer)
                if own[layer].side == "channels" and _pads_with_zeros(module):
                    mask &= _all_indices(_zero_rows(module), own[layer])


@torch.no_grad()
def input_ranges(model: nn.Module, layers: Sequence[str], calls: Sequence[Call]) -> dict[str, Range]:
    """Layer -> the range of each of its inputs over all calls; layers that are not called are left out."""
    ranges: dict[str, Range] = {}

    def recording(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            value = args[0]
            linear = isinstance(module, nn.Linear) or is_conv1d(module)
            axis = -1 if linear else value.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
            flat = value.movedim(axis, 0).flatten(1)
            now = Range(flat.amin(1), flat.amax(1))
            ranges[name] = now.union(ranges[name]) if name in ranges else now

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(recording(name)) for name in layers]
    try:
        for call in calls:
            call.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


@torch.no_grad()
def randomized(
    model: nn.Module, selections: Sequence[Selection], sign: float = 1, nonzero_only: bool = False
) -> nn.Module:
    """A copy in which random weights produce the selected units.

    Args:
        model: is not changed.
        selections: the units.
        sign: factor of biases, and of the weights of layers that mix channels. Norms keep their sign, so that the sign
            of a unit after the norm is that of the layer before it.
        nonzero_only: leave rows that are zero as they are, with their biases.
    """
    other = copied(model)
    random = torch.Generator().manual_seed(0)
    for group, mask in selections:
        for slot in group.producers:
            module = other.get_submodule(slot.layer)
            chosen = mask & ~_all_indices(_zero_rows(module), slot) if nonzero_only else mask
            rows, weight, bias = slot.select(chosen), _rows(module), getattr(module, "bias", None)
            factor = sign if slot.side == "outputs" else 1
            if weight is not None:
                noise = torch.randn(len(rows), *weight.shape[1:], generator=random, dtype=torch.float64)
                weight[rows] = (factor * noise / max(1, weight[0].numel()) ** 0.5).to(weight)
            if isinstance(bias, Tensor):
                bias[rows] = (factor * (1 + torch.rand(len(rows), generator=random, dtype=torch.float64))).to(bias)
    return other


def bias_update(model: nn.Module, slot: Slot, mask: Tensor, ranges: Mapping[str, Range]) -> Tensor | None:
    """What the selected constant units add to the layer's outputs; None if that is zero."""
    indices = slot.select(mask)
    low, high = (bound[indices] for bound in ranges[slot.layer])
    weight = columns(model, slot)[indices]
    weight = weight.sum(tuple(range(2, weight.dim()))) if weight.dim() > 2 else weight
    return update if bool((update := (low + high) / 2 @ weight).any()) else None


def _has_zero_rows(model: nn.Module, group: Group) -> Tensor:
    """Which units have only zeros in their rows in some producer."""
    zero = torch.zeros(len(group), dtype=torch.bool)
    for slot in group.producers:
        zero |= _all_indices(_zero_rows(model.get_submodule(slot.layer)), slot)
    return zero


def _zero_rows(module: nn.Module) -> Tensor:
    weight = _rows(module)
    if weight is None:  # a norm without weights
        return torch.zeros(int(module.num_features), dtype=torch.bool)  # type: ignore[arg-type]
    return weight.flatten(1).count_nonzero(1).cpu() == 0


def _rows(module: nn.Module) -> Tensor | None:
    """The weight of a layer, a view with its outputs first; None if it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    rows = weight.detach().movedim((axes(module) or (0,))[0], 0)
    return rows if rows.dim() > 1 else rows[:, None]


def _all_indices(flags: Tensor, slot: Slot) -> Tensor:
    """Which units have all their indices flagged; bool, [units]."""
    flagged: list[bool] = flags.cpu().tolist()
    return torch.tensor([all(flagged[index] for index in indices) for indices in slot.indices])


def _folds_any_value(model: nn.Module, layer: str) -> bool:
    """Whether the layer can take a constant input of any value into its bias."""
    module: Any = model.get_submodule(layer)
    if module.bias is None and enclosing_config(model, layer) is not None:
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module) or not (module.transposed or _pads_with_zeros(module))


def _pads_with_zeros(module: Any) -> bool:
    """Whether a convolution pads with zeros, so that it reads less of a constant at the border."""
    if module.padding == "same":
        pads = any(size > 1 for size in module.kernel_size)
    else:
        pads = module.padding != "valid" and any(module.padding)
    return pads and module.padding_mode == "zeros"
