"""The settings that a hunt's levels depend on, as JSON: the hunt's fingerprint, and what to say when one differs."""

import functools
import inspect
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from workbench import messages
from workbench.definitions import definitions_of
from workbench.definitions import difference as code_difference
from workbench.distributed.ranks import digest
from workbench.launcher.arguments import SHOWN
from workbench.models.architecture import describe

# Which device trains a level, and which callbacks observe it, does not make it another one.
_ELSEWHERE = ("accelerator", "devices", "num_nodes", "strategy", "callbacks", "plugins", "enable_checkpointing")
CODE = "code"
INITIAL, _MOVED = "initial weights", "other initial weights (give the model as it was at first, not as it was trained)"
_DEPTH, _LONGEST = 4, 100


def settings_of(
    module: nn.Module,
    network: nn.Module,
    data: Any = None,
    trainer: Mapping[str, Any] | None = None,
    **chosen: Any,
) -> dict[str, Any]:
    """The settings of a hunt in ``module`` before it is trained, to make its fingerprint of and compare with others.

    Args:
        module: Known by its class and arguments, and by the SHA-256 of its initial weights.
        network: The part of it that is pruned, known by its architecture.
        data: Known by its class and by those of its arguments that it keeps under their names.
        trainer: Arguments of Lightning's Trainer, of which those count that can change the result.
        chosen: Arguments of the hunt.

    Returns:
        As JSON; with the entry ``code``, the hashes of all classes and functions of these that are not installed.
    """
    budget = {name: value for name, value in (trainer or {}).items() if name not in (*_ELSEWHERE, *SHOWN)}
    code = definitions_of([module, network, data, *budget.values(), *chosen.values()])
    return {
        **({CODE: code} if code else {}),
        **{name: plain(value) for name, value in chosen.items()},
        "module": plain(module),
        "network": describe(network) or re.sub(r" at 0x[0-9a-f]+", "", repr(network)),
        INITIAL: digest(module.state_dict())[:16],
        "data": plain(data),
        "trainer": {name: plain(value) for name, value in sorted(budget.items()) if value is not None},
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first settings that differ, for a message: ``rate 0.4 instead of 0.5``; empty if none is known."""
    old, new = ({name: value for name, value in each.items() if name != CODE} for each in (before, now))
    changed = messages.difference(old, new, {INITIAL: _MOVED})
    if code := code_difference(before.get(CODE) or {}, now.get(CODE) or {}):
        code = f"other code ({code})"
    return ", ".join(filter(None, (changed, code)))


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON: an object as its class and those of its arguments that it keeps under their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if depth > _DEPTH:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(name): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value] if len(value) <= _LONGEST else f"{len(value)} items"
    if isinstance(value, functools.partial):
        given = {"args": value.args, **value.keywords}
        return {"call": _path(value.func), **{name: plain(item, depth + 1) for name, item in given.items() if item}}
    if hasattr(value, "__qualname__"):
        return _path(value)
    kept, names = getattr(value, "__dict__", {}), ()
    with suppress(ValueError, TypeError):
        names = inspect.signature(type(value)).parameters
    arguments = {name: plain(kept[name], depth + 1) for name in names if name in kept}
    if isinstance(value, nn.Module) and isinstance(given := getattr(value, "hparams", None), Mapping):
        arguments |= {name: plain(item, depth + 1) for name, item in given.items()}
    return {"class": _path(type(value)), **arguments} if arguments else _path(type(value))


def _path(named: Any) -> str:
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
