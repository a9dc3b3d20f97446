"""A masked network made physically smaller, with the same outputs."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune.masks import Masks
from prune.shrinking.architecture import noted
from prune.shrinking.equivalence import (
    Call,
    Coarsest,
    alike,
    answers,
    differences,
    largest,
    rounding,
    trains,
    usable,
    wide_answers,
)
from prune.shrinking.find import find_units
from prune.shrinking.surgery import Chosen, cut, empty, going, is_empty, removed_rows
from prune.shrinking.unused import constants, folded, read_values, scrambled, unread, zero_columns
from workbench.models.resize import add_bias


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` returns.

    Attributes:
        model: the smaller network, on the same device, in the same types and mode as the one it was made from.
        masks: of what is left, by the same names, to train on with; None if none were given.
        before: parameters of the network that was given.
        after: parameters of the smaller one.
        difference: the largest difference between outputs of the two, in the network's own precision, over the
            example inputs and random ones.
        removed: layer -> which of its outputs are gone, ascending, numbered as in the network that was given.
    """

    model: nn.Module
    masks: Masks | None
    before: int
    after: int
    difference: float
    removed: Mapping[str, tuple[int, ...]]


def shrink(model: nn.Module, example_inputs: Any, masks: Mapping[str, Tensor] | None = None) -> Shrunk:
    """The network without the channels, hidden units and attention heads that its zeros make superfluous.

    A unit goes if nothing reads it (every weight that reads it is zero), or if it is the same for every input (all
    weights that make it are zero): its value times the weights that read it then goes into the next biases, which are
    made where there are none. Either may make others superfluous, until nothing is left to do. Channels that are tied,
    by a residual connection say, go together or stay. In eval mode outputs are those of the masked network but for
    rounding, which is checked in float64, on ``example_inputs`` and on random inputs like them; a unit whose removal
    changes anything stays. So do

    - inputs and outputs of the network, and what is normalised together with other channels (LayerNorm; GroupNorm,
      unless a whole group goes);
    - constants on whose way to the next layer anything but activations, norms of single channels, averages, maxima and
      attention joins in, such as a mask, an input, or a sum over positions;
    - constants other than 0 that a convolution reads which pads with zeros, at the border of which it sees less of
      them, or that a layer without a bias in a model of transformers reads, whose ``from_pretrained`` would lose one;
    - layers called twice, tied weights, grouped convolutions that are not depthwise, layers of unknown kinds, and what
      is divided or numbered anew between layers (``chunk`` of a gated unit, channel and pixel shuffles);
    - what layers read that only training mode uses, such as auxiliary heads;
    - all but heads and feed-forward units of a network that has a transformer's layer of a known kind anywhere;
    - one unit of every layer, the first, where all could go; it is then made of zeros.

    A head whose values are constant is taken to attend to something: a sequence of padding alone may change. Whether
    something looks at a unit that no layer reads, only the inputs that are tried can tell.

    Args:
        model: the network; it is not changed.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        masks: parameter name -> bool mask, True where kept; None to go by the weights' zeros alone.

    Returns:
        The smaller network and what became of it.

    Raises:
        ValueError: if a mask does not fit, the network cannot be called or traced with ``example_inputs``, or its
            precision is too coarse for what constants add up to.

    References:
        Fang et al., DepGraph: Towards any structural pruning, 2023, arXiv:2301.12900 (which channels go together);
        Michel et al., Are sixteen heads really better than one?, 2019, arXiv:1905.10650 (heads).
    """
    given = Call.of(example_inputs).beside(model)
    masked = copy.deepcopy(model).eval()
    left = {} if masks is None else dict(Masks(masks))
    if masks is not None:
        Masks(masks).apply(masked)
    own = [given, given.drawn()]
    before = answers(masked, own)
    wide = copy.deepcopy(masked).double()
    for parameter in wide.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    calls = [call.double() for call in own]
    with Coarsest() as coarsest:
        expected = wide_answers(wide, calls)
    # What rounding does to the network itself is allowed of the smaller one.
    noise = [
        8 * apart + 4 * torch.finfo(value.dtype).eps * largest(value) if value.is_floating_point() else math.inf
        for value, apart in zip(before, differences(before, expected))
    ]
    calls += (further := [call for call in calls[0].others() if usable(wide, call)])
    expected += [value for call in further for value in call.outputs(wide)]
    for folding in (True, False):
        work = _Work(wide, left, calls, expected, rounding(expected, coarsest.eps), folding)
        while work.advance():
            pass
        smaller = _restored(work.model, model)
        noted(smaller, work.touched)
        apart = differences(before, answers(smaller, own))
        if all(each <= most for each, most in zip(apart, noise)):
            break
    else:
        raise ValueError(
            f"{type(model).__name__} shrunk differs by {max(apart):.3g} in its own precision, though not in float64: "
            "give it in a wider type"
        )
    for path, module in model.named_modules():
        smaller.get_submodule(path).training = module.training
    return Shrunk(
        smaller,
        None if masks is None else Masks(work.masks),
        _count(model),
        _count(smaller),
        max(each for each, value in zip(apart, before) if value.is_floating_point()),
        {layer: tuple(sorted(rows)) for layer, rows in work.removed.items()},
    )


class _Work:
    """A network in float64 that gets smaller step by step.

    Args:
        model: the network, in eval mode.
        masks: of it.
        calls: to try it with.
        expected: what it answers to them, one after the other.
        tolerance: largest difference of each of these that counts as rounding.
        folding: whether constants other than 0 may go into biases.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        calls: Sequence[Call],
        expected: list[Tensor],
        tolerance: list[float],
        folding: bool = True,
    ) -> None:
        self.model, self.masks = model, masks
        self.calls, self.expected, self.tolerance, self.folding = calls, expected, tolerance, folding
        self._trains = trains(model, calls[0])
        self.touched: set[str] = set()
        self.removed: dict[str, list[int]] = {}
        self._frozen: set[str] = set()

    def advance(self) -> bool:
        """Take out what can go now; False if that is nothing."""
        try:
            found = find_units(self.model, self.calls[0])
        except ValueError:
            if not self.removed:
                raise
            return False  # something became so small that it cannot be traced
        groups = [units for units in found if units.name not in self._frozen]
        chosen = []
        for units, same in zip(groups, constants(self.model, groups, self.calls, self.folding)):
            which = same | unread(self.model, units)
            if bool(which.any()) and not (len(units) == 1 and is_empty(self.model, units)):
                chosen.append((units, which))
        if not chosen:
            return False
        before = _left(self.model)
        if not self._take(chosen):
            # Some of them is not as superfluous as it looks: the others get their turn next time.
            bad = {units.name for units, which in chosen if self._without([(units, which)]) is None}
            self._frozen |= bad
            if bad:
                return True
            self._take(chosen[:1])
        return _left(self.model) < before

    def _take(self, chosen: Chosen) -> bool:
        """Take these units out; False if that changes anything."""
        found = self._without(chosen)
        if found is None:
            return False
        for layer, rows in removed_rows(going(chosen)).items():
            self._note(layer, rows)
        self.touched |= {slot.layer for units, _ in chosen for slot in units.slots}
        self.touched |= {holder for units, _ in chosen for holder, _ in units.counts}
        self.model, self.masks = found
        return True

    def _without(self, chosen: Chosen) -> tuple[nn.Module, dict[str, Tensor]] | None:
        """Network and masks without these units; None if answers depend on what the units are, or that they are."""
        trial, masks = copy.deepcopy(self.model), dict(self.masks)
        _fold(trial, masks, chosen, self.calls)
        try:
            if not self._same(trial) or not self._same(scrambled(trial, chosen)):
                return None
            empty(trial, chosen)
            cut(trial, going(chosen), masks)
            fits = self._same(trial) and (not self._trains or trains(trial, self.calls[0]))
            return (trial, masks) if fits else None
        except ValueError:  # a forward pass that expects the sizes that there were
            return None

    def _same(self, model: nn.Module) -> bool:
        return alike(self.expected, answers(model, self.calls), self.tolerance)

    def _note(self, layer: str, rows: list[int]) -> None:
        """Remember rows that go, by their numbers in the first network."""
        gone = self.removed.setdefault(layer, [])
        known, number, found = set(gone), 0, []
        wanted, seen = set(rows), 0
        while seen <= max(rows, default=-1):
            if number not in known:
                if seen in wanted:
                    found.append(number)
                seen += 1
            number += 1
        gone += found


@torch.no_grad()
def _fold(model: nn.Module, masks: dict[str, Tensor], chosen: Chosen, calls: Sequence[Call]) -> None:
    """Put what the layers that read these units get of them into their biases, and let them read nothing of it.

    Biases that get something are no longer masked.
    """
    slots = [(slot, which) for units, which in chosen for slot in units.read]
    values = read_values(model, [slot.layer for slot, _ in slots], calls)
    for slot, which in slots:
        module = model.get_submodule(slot.layer)
        if slot.layer in values and (extra := folded(model, slot, which, values)) is not None:
            add_bias(module).add_(extra)
            if (path := f"{slot.layer}.bias".lstrip(".")) in masks:
                masks[path] = masks[path] | (extra != 0).to(masks[path].device)
        zero_columns(model, slot, which)


@torch.no_grad()
def _restored(wide: nn.Module, model: nn.Module) -> nn.Module:
    """``wide`` in the types of ``model``, trained where that is."""
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    for name, parameter in wide.named_parameters(remove_duplicate=False):
        like = parameters.get(name)
        if like is None:  # a bias that was added
            like = parameters[f"{name.rpartition('.')[0]}.weight".lstrip(".")]
        parameter.data = parameter.data.to(like.dtype)
        parameter.requires_grad_(like.requires_grad)
    for name, buffer in wide.named_buffers():
        buffer.data = buffer.data.to(buffers[name].dtype)
    return wide


def _left(model: nn.Module) -> int:
    """What can become less: entries of weights, and those that are not zero."""
    return sum(p.numel() + int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
