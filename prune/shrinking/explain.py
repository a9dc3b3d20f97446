"""Why nothing could be removed from a masked network, in words."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from prune.shrinking.units import Group
from workbench.messages import some
from workbench.models.matrices import Matrix, matrices

_ONE_BY_ONE = (
    "no output and no input of any layer has lost all its weights: prune them together, with Coupled(example_inputs), "
    "or the structures channel, head and ffn"
)
_KINDS = ("linear", "convolution")


def why_unchanged(model: nn.Module, masks: Mapping[str, Tensor], groups: Collection[Group]) -> str:
    """Why none of the units that ``masks`` prune whole can go.

    Args:
        model: the network.
        masks: parameter name -> bool mask.
        groups: units that may be removed, as :func:`prune.shrinking.find.find_groups` gives them.
    """
    every = matrices(model)
    lost = {name: _lost(every[name], mask) for name, mask in masks.items() if name in every}
    if not any(any(sides) for sides in lost.values()):
        return _ONE_BY_ONE
    traced = {(slot.layer, slot.side == "inputs") for group in groups for slot in group.slots}
    reasons: dict[str, list[str]] = {}
    for name, sides in lost.items():
        if any(sides):
            path = name.rpartition(".")[0]
            can_go = any(here and (path, side) in traced for side, here in zip((False, True), sides))
            reasons.setdefault(_why(every[name], can_go), []).append(name)
    return "; ".join(f"{some(names)}: {why}" for why, names in reasons.items())


def _lost(matrix: Matrix, mask: Tensor) -> tuple[bool, bool]:
    """Whether a whole output, and whether a whole input, is pruned."""
    turned = matrix.turned(mask)
    outputs, inputs = turned.flatten(1).any(1), turned.transpose(0, 1).flatten(1).any(1)
    return not bool(outputs.all()), not bool(inputs.all())


def _why(matrix: Matrix, traced: bool) -> str:
    kind = type(matrix.layer).__name__
    if matrix.made_by is not None:
        return f"under {matrix.made_by}: remove the parametrization first"
    if matrix.kind not in _KINDS:
        return f"of {kind}, which is not cut"
    if traced:
        return (
            "what depends on the same units is not pruned with them (a residual connection, a norm over several), a "
            "single unit is left, or outputs would change"
        )
    return (
        "its units are inputs or outputs of the network, or pass what mixes, splits or renumbers them, or the layer is "
        "called twice, tied, or in groups"
    )
