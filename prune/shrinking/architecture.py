"""The sizes of a shrunk network, in its configuration where that has a field for them, else in ``resized``."""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from workbench.models.anatomy import layers_of
from workbench.models.architecture import build, describe
from workbench.models.resize import NEW_BIAS, Resized, axes, set_resized, sizes


def record_sizes(model: nn.Module, touched: Iterable[str]) -> None:
    """Record the sizes of ``model``, in place, so that `workbench.models.architecture.describe` can build it again.

    Feed-forward nets that are equally wide in all layers of a transformer become its configuration's width, so that
    ``save_pretrained`` and ``from_pretrained`` work; all other sizes go into ``model.resized``.

    Args:
        model: the smaller network.
        touched: paths of the modules that are smaller or got a bias.
    """
    paths = sorted({*touched, *getattr(model, "resized", {})})
    _update_configs(model, paths)
    set_resized(model, {})
    original = _as_constructed(model)
    resized: Resized = {}
    for path in paths:
        module = model.get_submodule(path)
        changed = sizes(module)
        if original is not None:
            before = original.get_submodule(path)
            changed = {name: size for name, size in changed.items() if size != getattr(before, name)}
            if axes(module) is not None and before.bias is None and module.bias is not None:
                changed[NEW_BIAS] = 1
        if changed:
            resized[path] = changed
    set_resized(model, resized)


def enclosing_config(model: nn.Module, path: str) -> Any:
    """The configuration of the innermost transformer around ``path``; None if there is none."""
    steps = path.split(".") if path else []
    for depth in range(len(steps), -1, -1):
        module = model.get_submodule(".".join(steps[:depth]))
        if hasattr(type(module), "config_class") and hasattr(module, "config"):
            return module.config
    return None


class _ConfigUse(NamedTuple):
    """A configuration, its field for the width of feed-forward nets, and the widths and layers that it is of."""

    config: Any
    field: str
    widths: set[int]
    paths: list[str]


def _update_configs(model: nn.Module, touched: Collection[str]) -> None:
    """Put the width that all feed-forward nets of a transformer have into its configuration, where it changed."""
    uses: dict[int, _ConfigUse] = {}
    for layer in layers_of(model):
        path = ".".join(filter(None, (layer.path, layer.anatomy.up)))
        up: Any = model.get_submodule(path)
        dims, config = axes(up), enclosing_config(model, layer.path)
        if dims is not None and config is not None:
            use = uses.setdefault(id(config), _ConfigUse(config, layer.anatomy.ffn, set(), []))
            use.widths.add(int(up.weight.shape[dims[0]]))
            use.paths.append(path)
    for config, field, widths, paths in uses.values():
        if len(widths) == 1 and hasattr(config, field) and not set(paths).isdisjoint(touched):
            setattr(config, field, widths.pop())


def _as_constructed(model: nn.Module) -> nn.Module | None:
    """What the constructor builds, on the meta device; None if the model does not record its arguments."""
    if (architecture := describe(model)) is None:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return build(architecture, Path(type(model).__name__))
    except ValueError:
        return None
