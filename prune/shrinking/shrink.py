"""A masked network made physically smaller, with the same outputs.

The loop, on a float64 copy in eval mode::

    find groups ──► select unused and constant units ──► try: fold constants, zero the columns that read them
         ▲                    │ none                          │ outputs change, also with random producers
         │                    ▼                               ▼
         │                  done              reject the groups that change outputs alone, go on with the rest
         └────── remove them ◄── outputs unchanged ──┘

Removing a layer's last reader makes that layer unused in turn, so the loop runs until nothing is selected. Every step
makes the network strictly smaller or rejects a group, so it ends.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune.masks import Masks
from prune.shrinking.architecture import record_sizes
from prune.shrinking.equivalence import (
    Call,
    CoarsestDtype,
    accepts,
    accepts_in_training,
    differences,
    float64_outputs,
    magnitude,
    outputs_of,
    tolerances,
    within_tolerances,
)
from prune.shrinking.explain import why_unchanged
from prune.shrinking.find import find_groups
from prune.shrinking.surgery import is_zero, keep_one, remove, zero_columns, zero_rows
from prune.shrinking.units import Selection, removed_outputs
from prune.shrinking.unused import bias_update, constant, input_ranges, randomized, unused
from workbench.messages import some
from workbench.models.copying import copied
from workbench.models.resize import add_bias
from workbench.models.wrappers import unwrap, wrapped_parts


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` returns.

    Attributes:
        model: the smaller network, on the device and in the dtypes and mode of the original.
        masks: of the smaller network, by the same names, for further training; None if none were given.
        before: number of parameters of the original.
        after: number of parameters of the smaller network.
        difference: the largest difference between their outputs, in the network's own precision, over the example
            inputs and random ones.
        removed: layer -> the indices of its removed outputs, ascending, numbered as in the original network.
    """

    model: nn.Module
    masks: Masks | None
    before: int
    after: int
    difference: float
    removed: Mapping[str, tuple[int, ...]]


def shrink(model: nn.Module, example_inputs: Any, masks: Mapping[str, Tensor] | None = None) -> Shrunk:
    """The network without the channels, hidden units and attention heads that its zeros make superfluous.

    A unit is removed if it is unused (every weight that reads it is zero) or constant (every weight that produces it
    is zero): its value times the weights that read it then goes into the next biases, which are added where there are
    none. This may make other units superfluous, so it is repeated. Channels that depend on each other, such as those of
    a residual connection, are removed together or stay. In eval mode the outputs are those of the masked network but
    for rounding. This is checked in float64, on ``example_inputs`` and on random inputs like them; a unit whose removal
    changes an output stays. These stay, too:

    - inputs and outputs of the network, and channels that are normalised together with others (LayerNorm; GroupNorm,
      unless a whole group is removed);
    - constants that are combined with anything but activations, norms of single channels, averages, maxima and
      attention before the next layer, such as a mask, an input, or a sum over positions;
    - constants other than 0 that are read by a convolution which pads with zeros (it reads less of them at the border),
      or by a layer without a bias in a model of transformers (whose ``from_pretrained`` would lose a new one);
    - layers called twice, tied weights, grouped convolutions that are not depthwise, layers of unknown kinds, and
      channels that are split or numbered anew between layers (``chunk`` of a gated unit, channel and pixel shuffles);
    - what layers read that only training mode uses, such as auxiliary heads;
    - all but heads and feed-forward units of a network that has a known transformer layer anywhere;
    - one unit of every layer, the first, where all could be removed; its weights are then zero.

    A head whose values are constant is assumed to attend to something: the output for a sequence of padding alone may
    change. Whether anything uses a unit that no layer reads is checked on the inputs tried, and only there.

    Args:
        model: the network; it is not changed.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        masks: parameter name -> bool mask, True where kept; None to go by the weights' zeros alone.

    Returns:
        The smaller network, its masks and sizes.

    Raises:
        ValueError: if a mask does not fit, the network cannot be called or traced with ``example_inputs``, or its
            precision is too coarse for what constants add up to.

    Warns:
        UserWarning: if nothing could be removed, saying why.

    References:
        Fang et al., DepGraph: Towards any structural pruning, 2023, arXiv:2301.12900 (which channels go together);
        Michel et al., Are sixteen heads really better than one?, 2019, arXiv:1905.10650 (heads).
    """
    model = unwrap(model)
    if parts := wrapped_parts(model):
        raise ValueError(
            f"{some(parts)} of this {type(model).__name__} are wrapped, by torch.compile, checkpointing or adapters: "
            "shrink the plain model (adapters merged by prune.merge_adapters), and wrap what comes out"
        )
    call = Call.of(example_inputs).on_device_of(model)
    masked = copied(model).eval()
    kept = {} if masks is None else dict(Masks(masks))
    if masks is not None:
        Masks(masks).apply(masked)
    own_calls = [call, call.randomized()]
    before = outputs_of(masked, own_calls)
    exact = copied(masked).double()
    for parameter in exact.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    calls = [each.double() for each in own_calls]
    with CoarsestDtype() as coarsest:
        expected = float64_outputs(exact, calls)
    # In its own precision the smaller network may be as far from the original as that is from its float64 copy.
    limits = [
        8 * difference + 4 * torch.finfo(value.dtype).eps * magnitude(value) if value.is_floating_point() else math.inf
        for value, difference in zip(before, differences(before, expected))
    ]
    calls += (variants := [each for each in calls[0].variants() if accepts(exact, each)])
    expected += [value for each in variants for value in each.outputs(exact)]
    # A folded constant may cancel a large sum only in float64: then fold nothing.
    for folding in (True, False):
        shrinker = _Shrinker(exact, kept, calls, expected, tolerances(expected, coarsest.eps), folding)
        while shrinker.step():
            pass
        prunes = not shrinker.removed and not all(bool(mask.all()) for mask in kept.values())
        why = why_unchanged(exact, kept, find_groups(exact, calls[0])) if prunes else ""
        smaller = _with_dtypes_of(model, shrinker.model)
        record_sizes(smaller, shrinker.touched)
        apart = differences(before, outputs_of(smaller, own_calls))
        if all(difference <= limit for difference, limit in zip(apart, limits)):
            break
    else:
        raise ValueError(
            f"{type(model).__name__} shrunk differs by {max(apart):.3g} in its own precision, though not in float64: "
            "give it in a wider type"
        )
    if why:
        warnings.warn(f"shrink took nothing out of these masks, because {why}", stacklevel=2)
    for path, module in model.named_modules():
        smaller.get_submodule(path).training = module.training
    return Shrunk(
        smaller,
        None if masks is None else Masks(shrinker.masks),
        _count(model),
        _count(smaller),
        max(difference for difference, value in zip(apart, before) if value.is_floating_point()),
        {layer: tuple(sorted(rows)) for layer, rows in shrinker.removed.items()},
    )


class _Shrinker:
    """A network in float64 that gets smaller step by step.

    Args:
        model: the network, in eval mode.
        masks: of its parameters.
        calls: to compare outputs on.
        expected: outputs of the original network, one call after the other.
        allowed: largest difference of each output that counts as rounding.
        folding: whether constants other than 0 may go into biases.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        calls: Sequence[Call],
        expected: list[Tensor],
        allowed: list[float],
        folding: bool = True,
    ) -> None:
        self.model, self.masks = model, masks
        self.calls, self.expected, self.allowed, self.folding = calls, expected, allowed, folding
        self._trainable = accepts_in_training(model, calls[0])
        self.touched: set[str] = set()
        self.removed: dict[str, list[int]] = {}
        self._rejected: set[str] = set()

    def step(self) -> bool:
        """Remove what can be removed now; False if that is nothing."""
        try:
            groups = find_groups(self.model, self.calls[0])
        except ValueError:
            if not self.removed:
                raise
            return False  # something became too small to be traced
        groups = [group for group in groups if group.name not in self._rejected]
        selections = []
        for group, mask in zip(groups, constant(self.model, groups, self.calls, self.folding)):
            mask = mask | unused(self.model, group)
            # The last unit of a layer stays, as zeros: do not select it for ever.
            if bool(mask.any()) and not (len(group) == 1 and is_zero(self.model, group)):
                selections.append(Selection(group, mask))
        if not selections:
            return False
        before = _size(self.model)
        if not self._remove(selections):
            # One of them is needed after all. Reject those that change outputs alone; the others are tried again.
            needed = {each.group.name for each in selections if self._without([each]) is None}
            self._rejected |= needed
            if needed:
                return True
            self._remove(selections[:1])  # each alone is fine, all together are not: go one by one
        return _size(self.model) < before

    def _remove(self, selections: Sequence[Selection]) -> bool:
        """Remove these units; False, and no change, if that changes outputs."""
        smaller = self._without(selections)
        if smaller is None:
            return False
        for layer, rows in removed_outputs(keep_one(selections)).items():
            self._record_removed(layer, rows)
        self.touched |= {slot.layer for group, _ in selections for slot in group.slots}
        self.touched |= {attribute.module for group, _ in selections for attribute in group.counts}
        self.model, self.masks = smaller
        return True

    def _without(self, selections: Sequence[Selection]) -> tuple[nn.Module, dict[str, Tensor]] | None:
        """Network and masks without these units; None if outputs depend on their values or on their number."""
        trial, masks = copied(self.model), dict(self.masks)
        _fold_constants(trial, masks, selections, self.calls)
        try:
            # Same outputs with random producers: nothing reads the units, by any way that tracing may have missed.
            if not self._unchanged(trial) or not self._unchanged(randomized(trial, selections)):
                return None
            zero_rows(trial, selections)
            remove(trial, keep_one(selections), masks)
            fits = self._unchanged(trial) and (not self._trainable or accepts_in_training(trial, self.calls[0]))
            return (trial, masks) if fits else None
        except ValueError:  # a forward pass that expects the original sizes
            return None

    def _unchanged(self, model: nn.Module) -> bool:
        return within_tolerances(self.expected, outputs_of(model, self.calls), self.allowed)

    def _record_removed(self, layer: str, rows: list[int]) -> None:
        """Record removed rows by their numbers in the original network: count on, past those already removed."""
        removed = self.removed.setdefault(layer, [])
        before, chosen = set(removed), set(rows)
        original, current = 0, 0
        while current <= max(rows, default=-1):
            if original not in before:
                if current in chosen:
                    removed.append(original)
                current += 1
            original += 1


@torch.no_grad()
def _fold_constants(
    model: nn.Module, masks: dict[str, Tensor], selections: Sequence[Selection], calls: Sequence[Call]
) -> None:
    """Add to the biases of the consuming layers what the selected units contribute, and zero the columns they read.

    Biases that change are no longer masked.
    """
    reads = [(slot, mask) for group, mask in selections for slot in group.consumers]
    ranges = input_ranges(model, [slot.layer for slot, _ in reads], calls)
    for slot, mask in reads:
        module = model.get_submodule(slot.layer)
        if slot.layer in ranges and (update := bias_update(model, slot, mask, ranges)) is not None:
            add_bias(module).add_(update)
            if (path := f"{slot.layer}.bias".lstrip(".")) in masks:
                masks[path] = masks[path] | (update != 0).to(masks[path].device)
        zero_columns(model, slot, mask)


@torch.no_grad()
def _with_dtypes_of(original: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` with the dtypes, and frozen parameters, of ``original``."""
    parameters = dict(original.named_parameters(remove_duplicate=False))
    buffers = dict(original.named_buffers())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        like = parameters.get(name)
        if like is None:  # a bias that was added
            like = parameters[f"{name.rpartition('.')[0]}.weight".lstrip(".")]
        parameter.data = parameter.data.to(like.dtype)
        parameter.requires_grad_(like.requires_grad)
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(buffers[name].dtype)
    return model


def _size(model: nn.Module) -> int:
    """Entries of weights, and nonzero entries: every step that changes something lowers it."""
    return sum(p.numel() + int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
