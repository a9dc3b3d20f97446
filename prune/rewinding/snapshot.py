"""What a training consists of at one moment, copied, and put back any number of times."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune.masks.memory import distributed, local
from prune.masks.stepping import unwrap_optimizer
from workbench.messages import closest
from workbench.models.wrappers import named_buffers, named_parameters
from workbench.randomness import random_state, set_random_state

PARTS = ("weights", "buffers", "optimizers", "schedulers", "scaler", "random")


class Restored(NamedTuple):
    """What a restore did.

    Args:
        rewound: Parts that are now as they were when the snapshot was taken.
        kept: Parts that it left alone.
    """

    rewound: tuple[str, ...]
    kept: tuple[str, ...]


@final
class Snapshot:
    """Copies of weights, buffers, optimizers, schedulers, gradient scaler and random state: a point to rewind to.

    Everything is cloned when taken, and copied in place when restored, so the training that goes on cannot change it
    and it can be restored again and again. On the CPU the same snapshot gives the same bits every time. Of DTensors
    (FSDP2) each rank holds its shards. Not in it: gradients, the order of the data, modes (train, eval), and what a
    loop counts by itself.

    Rewinding after Frankle et al. restores everything; learning-rate rewinding after Renda et al. everything but
    ``("weights", "buffers")``.

    Source: Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
    arXiv:1912.05671; Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning", 2020, arXiv:2003.02389.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}

    @classmethod
    def take(
        cls,
        model: nn.Module,
        optimizers: Any = None,
        schedulers: Any = None,
        scaler: Any = None,
        rng: bool = True,
        device: torch.device | str | None = "cpu",
    ) -> "Snapshot":
        """Copy a training as it is now.

        Args:
            model: Its parameters and buffers are copied, those that are in no state dict too.
            optimizers: One optimizer, or several.
            schedulers: One learning-rate scheduler, or several.
            scaler: A ``torch.amp.GradScaler``.
            rng: Whether to copy the random state of python, numpy (if it is imported) and torch, on the CPU and on the
                CUDA devices in use.
            device: Where the copies are kept; None for where each tensor is.

        Raises:
            ValueError: If a tensor has no values to copy, or an optimizer keeps state that belongs to no parameter.
        """
        snapshot = cls()
        snapshot._parts = {
            "weights": {name: _copy(name, p, device) for name, p in named_parameters(model)},
            "buffers": {name: _copy(name, b, device) for name, b in named_buffers(model)},
        }
        if optimizers is not None:
            snapshot._parts["optimizers"] = [_remember(each, device) for each in several(optimizers)]
        if schedulers is not None:
            snapshot._parts["schedulers"] = [copy.deepcopy(each.state_dict()) for each in several(schedulers)]
        if scaler is not None:
            snapshot._parts["scaler"] = copy.deepcopy(scaler.state_dict())
        if rng:
            snapshot._parts["random"] = random_state()
        return snapshot

    @property
    def what(self) -> tuple[str, ...]:
        """The parts it holds, of ``"weights", "buffers", "optimizers", "schedulers", "scaler", "random"``."""
        return tuple(self._parts)

    def __repr__(self) -> str:
        return f"Snapshot({', '.join(self.what)})"

    @torch.no_grad()
    def restore(
        self,
        model: nn.Module,
        optimizers: Any = None,
        schedulers: Any = None,
        scaler: Any = None,
        parts: Iterable[str] | None = None,
    ) -> Restored:
        """Put a training back to where the snapshot was taken.

        The arguments are the objects it was taken of, or new ones of the same names and shapes. State that an optimizer
        did not have then is removed. Everything is compared before anything is written.

        Args:
            model: As for :meth:`take`.
            optimizers: As for :meth:`take`.
            schedulers: As for :meth:`take`.
            scaler: As for :meth:`take`.
            parts: What to restore, of :attr:`what`; by default all of it for which there is an argument.

        Returns:
            Which parts were restored, and which were not.

        Raises:
            ValueError: If a part is not in the snapshot, an argument for it is missing, or names, shapes or numbers
                differ.
        """
        given = {"optimizers": optimizers, "schedulers": schedulers, "scaler": scaler}
        missing = [name for name, value in given.items() if value is not None and name not in self._parts]
        chosen = _chosen(parts, self.what, {name for name, value in given.items() if value is None}, missing)
        copies: list[tuple[Tensor, Tensor]] = []
        for part, named in (("weights", named_parameters(model)), ("buffers", named_buffers(model))):
            if part in chosen:
                copies += _pairs(part, self._parts[part], dict(named))
        pairs = {name: _matched(name, self._parts[name], given[name]) for name in chosen if name in _LISTS}
        for optimizer, saved in pairs.get("optimizers", ()):
            _check_optimizer(optimizer, saved)
        for live, saved in copies:
            local(live).copy_(saved)
        for optimizer, saved in pairs.get("optimizers", ()):
            _recall(optimizer, saved)
        for scheduler, saved in pairs.get("schedulers", ()):
            scheduler.load_state_dict(copy.deepcopy(saved))
        if "scaler" in chosen:
            scaler.load_state_dict(copy.deepcopy(self._parts["scaler"]))
        if "random" in chosen:
            set_random_state(self._parts["random"])
        return Restored(tuple(chosen), tuple(part for part in PARTS if part not in chosen))

    def state_dict(self) -> dict[str, Any]:
        """Its parts, as tensors and plain values that a checkpoint can carry; not copied again."""
        return dict(self._parts)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hold what another snapshot's :meth:`state_dict` gave.

        Raises:
            ValueError: If it is not one.
        """
        if "weights" not in state_dict or not set(state_dict) <= set(PARTS):
            raise ValueError(f"a state of {sorted(state_dict)} is not that of a Snapshot: its parts are {list(PARTS)}")
        self._parts = dict(state_dict)


_LISTS = ("optimizers", "schedulers")


def _chosen(parts: Iterable[str] | None, what: Sequence[str], absent: set[str], missing: Sequence[str]) -> list[str]:
    """The parts to restore, in order."""
    if missing:
        raise ValueError(f"the snapshot holds no {' and no '.join(missing)}, only {list(what)}: give them to take()")
    if parts is None:
        return [part for part in what if part not in absent]
    parts = [parts] if isinstance(parts, str) else list(parts)
    if unknown := [part for part in parts if part not in what]:
        raise ValueError(f"parts has {unknown}, but the snapshot holds {list(what)} only")
    if silent := [part for part in parts if part in absent]:
        raise ValueError(f"parts has {silent}, but restore() was not given any: give the objects to restore")
    return [part for part in what if part in parts]


def _copy(name: str, value: Tensor, device: torch.device | str | None) -> Tensor:
    if value.is_meta or nn.parameter.is_lazy(value):
        raise ValueError(f"'{name}' has no values yet: materialise it before the snapshot is taken")
    held = local(value)
    return held.clone() if device is None else held.to(device, copy=True)


def several(given: Any) -> list[Any]:
    """One object or several, as a list."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _remember(optimizer: Any, device: torch.device | str | None) -> dict[str, Any]:
    """Its hyperparameters by group, and its state by parameter, each counted from 0."""
    optimizer = unwrap_optimizer(optimizer)
    number = {id(parameter): index for index, (parameter, _) in enumerate(_hosted(optimizer))}
    if foreign := [key for key in optimizer.state if id(key) not in number]:
        raise ValueError(
            f"{type(optimizer).__name__} keeps state under {foreign[0]!r}, which is none of its parameters: a snapshot "
            "cannot hold that"
        )

    def kept(value: Any) -> Any:
        return _copy("state", value, device) if isinstance(value, Tensor) else copy.deepcopy(value)

    groups = [{k: kept(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {number[id(p)]: {k: kept(v) for k, v in entries.items()} for p, entries in optimizer.state.items()}
    return {"groups": groups, "sizes": [len(g["params"]) for g in optimizer.param_groups], "state": state}


def _recall(optimizer: Any, saved: Mapping[str, Any]) -> None:
    optimizer = unwrap_optimizer(optimizer)
    for group, values in zip(optimizer.param_groups, saved["groups"]):
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
        for key, value in values.items():
            group[key] = _put(group.get(key), value, group["params"][0] if group["params"] else value)
    for index, (parameter, on_host) in enumerate(_hosted(optimizer)):
        entries = saved["state"].get(index)
        if entries is None:
            optimizer.state.pop(parameter, None)
            continue
        live = optimizer.state[parameter]
        for key in [key for key in live if key not in entries]:
            del live[key]
        for key, value in entries.items():
            live[key] = _put(live.get(key), value, value if key == "step" and on_host else parameter)


def _hosted(optimizer: Optimizer) -> Iterator[tuple[Tensor, bool]]:
    """Each parameter, and whether its optimizer counts steps on the CPU."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, not (group.get("capturable") or group.get("fused"))


def _put(live: Any, saved: Any, beside: Tensor) -> Any:
    """``saved`` in the memory of ``live`` where that has room for it, else in memory of its own."""
    if not isinstance(saved, Tensor):
        return copy.deepcopy(saved)
    if isinstance(live, Tensor) and (local(live).shape, live.dtype) == (saved.shape, saved.dtype):
        local(live).copy_(saved)
        return live
    if distributed(beside) and saved.shape == local(beside).shape:
        made = torch.zeros_like(beside, dtype=saved.dtype)
        local(made).copy_(saved)
        return made
    return saved.to(beside.device, copy=True)


def _pairs(part: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if saved.keys() != live.keys():
        name = sorted(saved.keys() ^ live.keys())[0]
        where = "the snapshot has" if name in saved else "the model has"
        near = closest(name, live if name in saved else saved, 0)
        raise ValueError(
            f"{part} of snapshot and model differ: only {where} '{name}' (nearest in the other: {near}). Give the "
            "model that the snapshot was taken of, or one like it"
        )
    for name, tensor in live.items():
        if local(tensor).shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)} in the snapshot and {tuple(local(tensor).shape)} in the model"
            raise ValueError(f"'{name}' has shape {shapes}: give a model like the one that it was taken of")
    return [(tensor, saved[name]) for name, tensor in live.items()]


def _matched(what: str, saved: Sequence[Any], given: Any) -> list[tuple[Any, Any]]:
    live = several(given)
    if len(live) != len(saved):
        raise ValueError(f"{len(live)} {what} are given, but the snapshot holds {len(saved)}: give as many, in order")
    return list(zip(live, saved))


def _check_optimizer(optimizer: Any, saved: Mapping[str, Any]) -> None:
    optimizer = unwrap_optimizer(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != saved["sizes"]:
        raise ValueError(
            f"{type(optimizer).__name__} has groups of {sizes} parameters, the snapshot of {saved['sizes']}: give the "
            "optimizer that it was taken of, or one made alike"
        )
