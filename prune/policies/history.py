"""What happened to a model before a policy starts, and between the steps that it follows."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune.masks import Masks
from prune.masks.memory import local, owners, shard, summed
from prune.pruner import Pruner
from prune.pruner.scope import patterns_of
from workbench.messages import difference, some

_MANY = 0.05


@torch.no_grad()
def zeros(weights: Mapping[str, nn.Parameter]) -> float:
    """The share of zeros in the weights that are not zero altogether, in [0, 1]; a layer may begin as all zeros."""
    zero = total = 0
    for weight in weights.values():
        found = int(summed((local(weight) == 0).sum(), owners(weight)))
        if found < weight.numel():
            zero, total = zero + found, total + weight.numel()
    return zero / total if total else 0.0


def pruned_before(weights: Mapping[str, nn.Parameter]) -> str | None:
    """In words, that the weights look pruned: more than one of twenty is exactly 0; None if they do not."""
    share = zeros(weights)
    return f"{share:.1%} of the weights of {some(weights)} are exactly 0" if share > _MANY else None


def check_new(kind: str, weights: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Refuse what looks as if it had been trained before, of which the policy knows nothing.

    Raises:
        ValueError: If many weights are zero, or an optimizer has stepped.
    """
    signs = [] if (pruned := pruned_before(weights)) is None else [pruned]
    signs += [f"{type(each).__name__} has stepped already" for each in optimizers if _has_stepped(each)]
    if signs:
        raise ValueError(
            f"{' and '.join(signs)}, but this {kind} has no state: it would start at update 0 with a dense network, in "
            f"which what was pruned grows again. Resume it with policy.load_state_dict(...) of the {kind}'s "
            "state_dict(), saved beside model and optimizer; or, where it is to start here, follow(..., anew=True)"
        )


def warn_pruned(kind: str, weights: Mapping[str, nn.Parameter]) -> None:
    """Warn of weights that look pruned, and will grow again.

    Warns:
        UserWarning: If many are zero.
    """
    if (pruned := pruned_before(weights)) is not None:
        warnings.warn(
            f"{pruned}, but this {kind} has no state of a training that pruned them: it starts with a dense network, "
            "in which they grow again. Resume from a checkpoint that has its state; or keep them pruned, with "
            "KeepMasked of their masks",
            stacklevel=5,
        )


def check_same_settings(kind: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on under other settings.

    Raises:
        ValueError: Naming those that differ.
    """
    if differing := difference(now, before):
        raise ValueError(
            f"the {kind} that is resumed has other settings than it was trained with: {differing}. Resume with those; "
            "or start a new training from the weights alone, to prune on with initial= its density and begin='0it'"
        )


def named(value: Any) -> str:
    """An axis, schedule or decay as it is written: its name, or its class with what it was made with."""
    if isinstance(value, str):
        return value
    return getattr(value, "name", None) or getattr(value, "__qualname__", None) or _made(value)


def axes_of(pruner: Pruner) -> dict[str, Any]:
    """What a pruner goes by, for :func:`check_same_settings`."""
    scope = {"include": patterns_of(pruner.include), "exclude": patterns_of(pruner.exclude)}
    chosen = {word: [named(each) for each in patterns] for word, patterns in scope.items() if patterns is not None}
    group = pruner.axes.criterion.group if pruner.group is None else pruner.group
    rest = {"output": pruner.output, "seed": pruner.seed, "smallest": pruner.smallest, "group": group}
    return {**{axis: named(value) for axis, value in pruner.axes._asdict().items()}, **chosen, **rest}


@final
class Watch:
    """Notices weights that something else than the optimizers changes, such as ``load_state_dict``.

    Every change in place counts up a tensor's version, so weights are compared with their masks only where it moved.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def note(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Remember the weights as they are now."""
        self._seen = {name: (id(weight), weight._version) for name, weight in weights.items()}

    @torch.no_grad()
    def strays(self, weights: Mapping[str, nn.Parameter], masks: Masks) -> dict[str, int]:
        """Number of pruned weights that are not zero, by name, among the weights changed since :meth:`note`."""
        changed = {n: w for n, w in weights.items() if self._seen.get(n, (id(w), w._version)) != (id(w), w._version)}
        alive = {name: _alive(weight, masks[name]) for name, weight in changed.items() if name in masks}
        if not alive:
            return {}
        home = next(iter(alive.values())).device
        counts = torch.stack([count.to(home) for count in alive.values()]).tolist()  # one synchronisation for all
        return {name: count for name, count in zip(alive, counts) if count}


def say_strayed(strays: Mapping[str, int], masks: Masks, when: str) -> None:
    """Warn that weights are not masked any more.

    Warns:
        UserWarning: By name.
    """
    kept, total = (sum(count) for count in zip(*masks.counts().values()))
    density = (kept + sum(strays.values())) / total
    warnings.warn(
        f"weights that were pruned are not zero {when}, in {some(strays)}: other weights were loaded. Their scores are "
        f"those of a network of density {density:.4g}, not {masks.density:.4g}. Compare and reload only weights saved "
        "at the final density; masks.apply(model) prunes these",
        stacklevel=4,
    )


def _made(value: Any) -> str:
    text = repr(value) if is_dataclass(value) else ""
    return text if text and len(text) < 100 else type(value).__name__


def _alive(weight: nn.Parameter, mask: Tensor) -> Tensor:
    return summed(local(weight).masked_fill(shard(mask, weight), 0).count_nonzero(), owners(weight))


def _has_stepped(optimizer: Optimizer) -> bool:
    """Whether it counts a step, or has state without a count. Plain SGD has neither; Adagrad begins at 0."""
    return any(state.get("step", 1) > 0 for state in optimizer.state.values() if state)
