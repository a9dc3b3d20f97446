"""What a module was built with, as JSON, and the module built again from it. Torch only."""

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from workbench.models.resize import ResizeError, is_resized, resize
from workbench.models.wrappers import class_of, has_adapters, unwrap

_ATTENTION = ("eager", "sdpa")
_POOLER = "add_pooling_layer"
_MODULE, _CLASS = "torch.nn.Module", "type[torch.nn.Module]"


def describe(model: nn.Module) -> dict[str, Any] | None:
    """How to build ``model`` again, as JSON, or None if that is not recorded.

    A transformers model is described by its configuration; any other by its class and what its constructor was given:
    its ``init_args``, or a LightningModule's ``hparams``, or none where it takes none. An activation that was
    swapped in afterwards, and layers that were made smaller, are noted beside. Wrappers are looked through; a network
    with adapters of PEFT is not described, for its class does not make them.
    """
    if has_adapters(model):
        return None
    model = unwrap(model)
    cls = class_of(model)
    description: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    config: Any = getattr(model, "config", None)
    try:
        if hasattr(cls, "config_class") and hasattr(config, "to_json_string"):
            description["config"] = json.loads(config.to_json_string(use_diff=False))
            # transformers leaves it out of the file, and the two differ in the last bits.
            if (attention := getattr(config, "_attn_implementation", None)) in _ATTENTION:
                description["config"]["attn_implementation"] = attention
            if _POOLER in inspect.signature(cls).parameters and getattr(model, "pooler", None) is None:
                description["pooler"] = False
        else:
            description["init_args"] = _arguments(model)
        if swapped := getattr(model, "swapped_activation", None):
            description["activation"] = swapped
        if resized := getattr(model, "resized", None):
            description["resized"] = resized
        return json.loads(json.dumps(description))
    except (TypeError, ValueError):
        return None


def build(architecture: Mapping[str, Any] | None, path: Path) -> nn.Module:
    """The untrained module that ``architecture`` describes; ``path`` is named in errors.

    Raises:
        ValueError: If it cannot be built.
    """
    if architecture is None:
        raise ValueError(f"{path} does not say how to build its model: pass one, load(path, model=...)")
    name = architecture["class_path"]
    cls = _module_class(name, path)
    try:
        if "config" in architecture:
            options = {} if architecture.get("pooler", True) else {_POOLER: False}
            model = cls(cls.config_class.from_dict(dict(architecture["config"])), **options)  # type: ignore[attr-defined]
        else:
            model = cls(**{name: _argument_from_json(value, path) for name, value in architecture["init_args"].items()})
        if "activation" in architecture:
            from workbench.models.activations import swap_activation

            swap_activation(model, architecture["activation"])
        if "resized" in architecture:
            resize(model, architecture["resized"])
    except ResizeError as error:
        raise ResizeError(f"{path}: {error}") from error
    except Exception as error:  # a constructor may raise anything on unexpected arguments
        raise ValueError(f"{path}: {name} cannot be built from its stored arguments: {error}") from error
    return model


def _module_class(name: str, path: Path) -> type[nn.Module]:
    module, _, qualname = name.rpartition(".")
    try:
        cls = getattr(import_module(module), qualname)
    except Exception as error:  # a foreign module may raise anything on import
        raise ValueError(
            f"{path} needs the class {name!r}, which cannot be imported ({error}): "
            "install the package that has it, or pass the model, load(path, model=...)"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{path} names {name!r}, which is not a torch.nn.Module class")
    return cls


def argument_to_json(argument: Any) -> Any:
    """A constructor's argument as JSON has it: a module as its architecture, a class as its path."""
    if isinstance(argument, nn.Module):
        return {_MODULE: describe(argument)}
    if isinstance(argument, type):
        return {_CLASS: f"{argument.__module__}.{argument.__qualname__}"}
    return argument


def _argument_from_json(argument: Any, path: Path) -> Any:
    """The inverse of :func:`argument_to_json`."""
    if isinstance(argument, dict) and len(argument) == 1:
        if _MODULE in argument:
            return build(argument[_MODULE], path)
        if _CLASS in argument:
            return _module_class(str(argument[_CLASS]), path)
    return argument


def is_architecture(value: Any) -> bool:
    """Whether ``value``, out of a file, has the form that :func:`describe` gives; its names are not looked up."""
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
        return False
    arguments = [value[key] for key in ("init_args", "config") if key in value]
    if len(arguments) != 1 or not isinstance(arguments[0], dict) or not isinstance(value.get("activation", ""), str):
        return False
    if not (isinstance(value.get("pooler", False), bool) and is_resized(value.get("resized", {}))):
        return False
    # transformers would fetch any other attention from its hub, and run it.
    todo: list[Any] = [value.get("config"), value.get("init_args")]
    while todo:
        inner = todo.pop()
        pairs = list(inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ())
        if any("attn_implementation" in str(key) and item not in (None, *_ATTENTION) for key, item in pairs):
            return False
        todo += [item for _, item in pairs]
    return True


def _arguments(model: nn.Module) -> dict[str, Any]:
    """The constructor's arguments; raises TypeError if they are unknown or incomplete."""
    signature = inspect.signature(class_of(model))
    init_args: Any = getattr(model, "init_args", None)
    if not isinstance(init_args, Mapping):
        init_args = getattr(model, "hparams", None) or ({} if not signature.parameters else None)
    if not isinstance(init_args, Mapping):
        raise TypeError(f"{class_of(model).__name__} does not say what it was built with")
    arguments = {name: value for name, value in init_args.items() if name != "_instantiator"}
    signature.bind(**arguments)
    return arguments
