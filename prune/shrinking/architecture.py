"""What a shrunk network says of itself: in its configuration where that can say it, else beside its constructor."""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.models.anatomy import layers_of
from workbench.models.architecture import build, describe
from workbench.models.resize import NEW_BIAS, Resized, axes, note, sizes


def noted(model: nn.Module, touched: Iterable[str]) -> None:
    """Let ``model`` tell `workbench.models.architecture.describe` how to build it again, in place.

    Feed-forward nets that are equally wide in all layers of a transformer become its configuration's width, so that
    ``save_pretrained`` and ``from_pretrained`` do; what is left goes into ``model.resized``.

    Args:
        model: the smaller network.
        touched: paths of the modules that are smaller or got a bias.
    """
    paths = sorted({*touched, *getattr(model, "resized", {})})
    _configure(model, paths)
    note(model, {})
    fresh = _fresh(model)
    resized: Resized = {}
    for path in paths:
        module = model.get_submodule(path)
        found = sizes(module)
        if fresh is not None:
            made = fresh.get_submodule(path)
            found = {name: size for name, size in found.items() if size != getattr(made, name)}
            if axes(module) is not None and made.bias is None and module.bias is not None:
                found[NEW_BIAS] = 1
        if found:
            resized[path] = found
    note(model, resized)


def config_around(model: nn.Module, path: str) -> Any:
    """The configuration of the innermost transformer that ``path`` lies in."""
    steps = path.split(".") if path else []
    for depth in range(len(steps), -1, -1):
        module = model.get_submodule(".".join(steps[:depth]))
        if hasattr(type(module), "config_class") and hasattr(module, "config"):
            return module.config
    return None


def _configure(model: nn.Module, touched: Collection[str]) -> None:
    """Put the width that all feed-forward nets of a transformer have into its configuration, where it changed."""
    holders: dict[int, tuple[Any, str, set[int], list[str]]] = {}
    for layer in layers_of(model):
        path = ".".join(filter(None, (layer.path, layer.anatomy.up)))
        up: Any = model.get_submodule(path)
        where, config = axes(up), config_around(model, layer.path)
        if where is not None and config is not None:
            _, _, widths, paths = holders.setdefault(id(config), (config, layer.anatomy.ffn, set(), []))
            widths.add(int(up.weight.shape[where[0]]))
            paths.append(path)
    for config, field, widths, paths in holders.values():
        if len(widths) == 1 and hasattr(config, field) and not set(paths).isdisjoint(touched):
            setattr(config, field, widths.pop())


def _fresh(model: nn.Module) -> nn.Module | None:
    """What the constructor makes, without memory; None if the model does not say how, or that cannot be done."""
    if (architecture := describe(model)) is None:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return build(architecture, Path(type(model).__name__))
    except ValueError:
        return None
