"""Wrappers around a model or a part of it: names and modules as they are without them.

Masks, checkpoints and features name weights and layers as the model itself does, whatever it is trained in:

================================================================= ========================================
wrapper                                                           where it has what it wraps
================================================================= ========================================
``torch.compile``, also of a part                                 ``_orig_mod``
``DistributedDataParallel``, ``DataParallel``, DeepSpeed's engine ``module``
``FullyShardedDataParallel`` (FSDP1)                              ``_fsdp_wrapped_module``
``fully_shard`` (FSDP2)                                           none: it puts a class before the model's
activation checkpointing of torch                                 ``_checkpoint_wrapped_module``
Lightning Fabric                                                  ``_forward_module``
``AveragedModel``, timm's ``ModelEma``                            ``module``, ``ema``
PEFT                                                              ``base_model.model``, ``base_layer``, the
                                                                  copy of ``modules_to_save`` in use
================================================================= ========================================

Accelerate wraps in the first four, and replaces ``forward`` for mixed precision, which changes no name. Wrappers are
known by their class, so that a layer of one's own may be called ``module``. Nothing but torch is imported for this.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

_INNER = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEma": "ema",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_ADAPTERS = {
    "peft.peft_model.PeftModel": "base_model",
    "peft.mixed_model.PeftMixedModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "peft.tuners.tuners_utils.BaseTunerLayer": "base_layer",
}
_COPIES = "peft.utils.other.ModulesToSaveWrapper"
_NOT_IN_STATE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_INFIXES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_PREFIXES = ("module.", "base_model.model.")


class Place(NamedTuple):
    """Where a model has a parameter.

    Attributes:
        name: Its name without wrappers.
        path: Its name in the model, as of ``named_parameters``.
        owner: The module that has it.
        attribute: As what.
    """

    name: str
    path: str
    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, looked up anew: ``model.to`` and ``fully_shard`` may replace it."""
        return self.owner.get_parameter(self.attribute)


def unwrap(model: nn.Module, adapters: bool = False) -> nn.Module:
    """The model inside wrappers around the whole of it, whose outputs are those of the model.

    Args:
        model: Any module.
        adapters: Whether to go on to what the adapters of PEFT were added to: its class and configuration are those
            of the network, its layers still hold adapters.
    """
    while (inner := _inner(model, adapters)) is not None:
        model = inner[1]
    return model


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of the model inside its wrappers, without the one that FSDP2 puts before it."""
    mro = type(unwrap(model, adapters=True)).__mro__
    return next(cls for cls in mro if not cls.__module__.startswith("torch.distributed."))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters, or copies of layers that it trains, into the model."""
    marks = {*_ADAPTERS, _COPIES}
    return any(not marks.isdisjoint(_kinds(type(module))) for module in model.modules())


def wrapped_parts(model: nn.Module) -> list[str]:
    """The paths, in the model as it is, of wrappers and of adapters of PEFT; empty if there are none."""
    return [path for path, module in model.named_modules() if _inner(module, adapters=True) is not None]


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are adapters, by name, and copies of layers that are out of use.

    Those of PEFT are what stands beside the layer, or the model, that it wraps. Those of other packages, and of one's
    own, are known where they are called ``lora_...``.
    """
    found: dict[str, nn.Parameter] = {}
    for at in _walk(_Visit(model)):
        for attribute, parameter in at.module._parameters.items():
            name = _join(at.name, attribute)
            if parameter is not None and (at.beside or any(step.startswith("lora_") for step in name.split("."))):
                found.setdefault(name, parameter)
    return found


def named_modules(
    model: nn.Module, remove_duplicate: bool = True, adapted: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Every module but wrappers by its path without them, in definition order, as ``nn.Module.named_modules``.

    Args:
        model: Any module.
        remove_duplicate: Whether a shared module comes under its first path only.
        adapted: Whether a layer with adapters comes with them, as what returns the sum of both, rather than without.
    """
    names: set[str] = set()
    modules: set[nn.Module] = set()
    for module, name, *_ in _walk(_Visit(model)):
        if _inner(module, adapters=not adapted) is not None or name in names:
            continue
        if not (remove_duplicate and module in modules):
            names.add(name)
            modules.add(module)
            yield name, module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by its first name without wrappers."""
    names = plain_names(model)
    return ((names.get(name, name), parameter) for name, parameter in model.named_parameters())


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer once, by its first name without wrappers."""
    names = plain_names(model)
    return ((names.get(name, name), buffer) for name, buffer in model.named_buffers())


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module that has this path without wrappers.

    Raises:
        AttributeError: If there is none.
    """
    module = model
    for step in path.split(".") if path else ():
        around = [module]
        while (inner := _inner(around[-1], adapters=True)) is not None:
            around.append(inner[1])
        # The network's own part comes first, then what stands beside it, such as the adapters of a layer.
        found = (child for each in reversed(around) if isinstance(child := getattr(each, step, None), nn.Module))
        if (child := next(found, None)) is None:
            kind = type(around[-1]).__name__
            raise AttributeError(f"{kind} has no submodule '{step}', the model has no '{path}'")
        module = child
    return unwrap(module, adapters=True)


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter under each of its names without wrappers, in definition order.

    Raises:
        ValueError: If FSDP1 has put them into flat pieces.
    """
    found: dict[str, Place] = {}
    for module, name, path, *_ in _walk(_Visit(model)):
        if _FSDP1 in _kinds(type(module)):
            _check_fsdp1(module)
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                place = Place(_join(name, attribute), _join(path, attribute), module, attribute)
                found.setdefault(place.name, place)
    return found


def plain_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer in ``model``, and in its state dict -> its name without wrappers."""
    names: dict[str, str] = {}
    for module, name, *paths, _ in _walk(_Visit(model)):
        for attribute in (*module._parameters, *module._buffers):
            names |= {_join(path, attribute): _join(name, attribute) for path in paths}
    return names


def plain_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of ``model`` by names without wrappers; names that it does not know stay as they are."""
    names = plain_names(model)
    return {names.get(name, name): value for name, value in state.items()}


def without_prefixes(name: str) -> str:
    """A name out of a file, without what wrappers put into it: by their words alone, so look for the name itself first.

    ``module._orig_mod.layers.0.weight`` is ``layers.0.weight``.
    """
    name = _INFIXES.sub("", name)
    while prefix := next((each for each in _PREFIXES if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def _inner(module: nn.Module, adapters: bool) -> tuple[str, nn.Module] | None:
    """The attribute in which a wrapper has what it wraps, and that; None if the module is no wrapper."""
    kinds = _kinds(type(module))
    if adapters and _COPIES in kinds:
        active = getattr(module, "active_adapter", None)
        for adapter in [active] if isinstance(active, str) else list(active or ()):
            if isinstance(copy := getattr(module, "modules_to_save", {}), nn.ModuleDict) and adapter in copy:
                return f"modules_to_save.{adapter}", copy[adapter]
        return None
    known = (attribute for kind in kinds if (attribute := _attribute(kind, adapters)) is not None)
    attribute = next(known, None)
    inner = None if attribute is None else getattr(module, attribute, None)
    return (attribute, inner) if attribute is not None and isinstance(inner, nn.Module) else None


def _attribute(kind: str, adapters: bool) -> str | None:
    return _INNER.get(kind, _ADAPTERS.get(kind) if adapters else None)


@lru_cache(maxsize=4096)
def _kinds(cls: type) -> tuple[str, ...]:
    return tuple(f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__)


class _Visit(NamedTuple):
    """A module under one of its paths.

    Attributes:
        module: Itself, wrappers included.
        name: Its path without wrappers.
        path: Its path in the model.
        key: Its path in the model's state dict, from which some wrappers take themselves out.
        beside: Whether it stands beside what a wrapper wraps, as adapters do.
    """

    module: nn.Module
    name: str = ""
    path: str = ""
    key: str = ""
    beside: bool = False

    def child(self, attribute: str, module: nn.Module, beside: bool = False) -> "_Visit":
        name, path, key = (_join(each, attribute) for each in self[1:4])
        return _Visit(module, name, path, key, self.beside or beside)


def _walk(at: _Visit) -> Iterator[_Visit]:
    """Every module under each of its paths.

    What a wrapper has beside what it wraps, such as the adapters beside a layer, stands at the wrapper's own place.
    """
    yield at
    children = [(name, child) for name, child in at.module._modules.items() if child is not None]
    inner = _inner(at.module, adapters=True)
    if inner is None:
        for name, child in children:
            yield from _walk(at.child(name, child))
        return
    attribute, wrapped = inner
    key = at.key if attribute in _NOT_IN_STATE else _join(at.key, attribute)
    yield from _walk(_Visit(wrapped, at.name, _join(at.path, attribute), key, at.beside))
    for name, child in children:
        if attribute.startswith(f"{name}."):  # the other copies beside the one in use
            beside = at.child(name, child)
            copies = ((other, copy) for other, copy in child._modules.items() if copy not in (None, wrapped))
            for other, copy in copies:
                assert copy is not None
                yield from _walk(beside.child(other, copy, beside=True))
        # Fabric has the model a second time beside its wrapper.
        elif name != attribute and unwrap(child) is not unwrap(wrapped):
            yield from _walk(at.child(name, child, beside=True))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_fsdp1(module: Any) -> None:
    strategy = getattr(module, "sharding_strategy", None)
    if not getattr(module, "_use_orig_params", False) or getattr(strategy, "name", "") != "NO_SHARD":
        raise ValueError(
            "FullyShardedDataParallel keeps the weights in flat pieces, where masks do not fit: shard the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2), or give use_orig_params=True and ShardingStrategy.NO_SHARD"
        )
