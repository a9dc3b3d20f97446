"""Layers made smaller than their constructors made them: their sizes as JSON, and the same sizes given to fresh ones.

Torch only. A network that was shrunk keeps in ``model.resized`` which of its modules have other sizes than its
constructor gives them, ``{path: {attribute: size}}``; compact checkpoints note it, and loading resizes what was built.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Sizes = dict[str, int]
Resized = dict[str, Sizes]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NAMES: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    ((nn.Linear,), ("out_features", "in_features")),
    ((*_CONVOLUTIONS, *_TRANSPOSED), ("out_channels", "in_channels", "groups")),
    (_NORMS, ("num_features",)),
    ((nn.GroupNorm,), ("num_channels", "num_groups")),
    ((nn.PReLU,), ("num_parameters",)),
)
# What attention keeps of the number of its heads, in any library.
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads", "num_key_value_groups")
WIDTHS = ("all_head_size", "split_size")
NEW_BIAS = "new_bias"
_LARGEST = 2**31
_FREE = 2**26
_RATIO = 64


class ResizeError(ValueError):
    """Sizes that a module cannot take."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with its weight the other way round."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def axes(module: nn.Module) -> tuple[int, int] | None:
    """Which dimension of its weight is of its outputs and which of its inputs; None if it does not map channels."""
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return 0, 1
    return (1, 0) if isinstance(module, _TRANSPOSED) or is_conv1d(module) else None


def is_channelwise(module: nn.Module) -> bool:
    """Whether each channel has separate parameters: a norm over other dimensions, a depthwise convolution."""
    if isinstance(module, (*_NORMS, nn.GroupNorm)):
        return True
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def sizes(module: nn.Module) -> Sizes:
    """Name -> value of the attributes that hold the sizes of ``module``."""
    return {name: int(getattr(module, name)) for name in _names(module)}


def set_resized(model: nn.Module, resized: Mapping[str, Mapping[str, int]]) -> None:
    """Keep in ``model.resized`` what differs from its constructor, or nothing if nothing does."""
    if resized:
        setattr(model, "resized", {path: dict(entry) for path, entry in resized.items()})  # noqa: B010
    elif hasattr(model, "resized"):
        delattr(model, "resized")


def sync_sizes(module: nn.Module) -> None:
    """Set the size attributes of a layer from its tensors, after channels were removed."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        if isinstance(module, _NORMS) and isinstance(module.running_mean, Tensor):
            module.num_features = len(module.running_mean)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif is_conv1d(module):
        conv: Any = module
        conv.nx, conv.nf = weight.shape
    elif isinstance(module, _CONVOLUTIONS):
        depthwise = module.groups > 1
        module.out_channels = len(weight)
        module.in_channels = len(weight) if depthwise else weight.shape[1]
        module.groups = len(weight) if depthwise else 1
    elif isinstance(module, _TRANSPOSED):
        module.in_channels, module.out_channels = weight.shape[:2]
    elif isinstance(module, _NORMS):
        module.num_features = len(weight)
    elif isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = len(weight), len(weight) // per_group
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def resize(model: nn.Module, resized: Mapping[str, Any]) -> None:
    """Give modules of a freshly built ``model`` smaller sizes, in place; their weights are then to be filled.

    Args:
        model: As its constructor makes it, on any device, meta too.
        resized: ``{path: {attribute: size}}``, as :func:`sizes` gives them, and ``new_bias`` for a bias that the
            constructor does not make. It may come out of a file: nothing is allocated before it is checked.

    Raises:
        ResizeError: If the form is another, a module or attribute is missing or cannot be set, a size is not between
            1 and what the constructor made, weights are tied to another module's, or next to nothing of the module
            would be left.
    """
    if not is_resized(resized):
        raise ResizeError(f"resized is {str(resized)[:200]}: give {{module: {{attribute: size}}}}")
    before = _entries(model)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, wanted in resized.items():
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise ResizeError(f"{type(model).__name__} has no module {path!r} to resize") from error
        own = sizes(module)
        if missing := [name for name in wanted if name not in own and not _may_add_bias(module, name)]:
            raise ResizeError(
                f"{path} ({type(module).__name__}) has no size {missing[0]!r}: it has {', '.join(own) or 'none'}"
            )
        if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            raise ResizeError(f"{path} shares its weights with another module, which would not be resized with it")
        for name, size in wanted.items():
            if name != NEW_BIAS and not 1 <= size <= own[name]:
                raise ResizeError(f"{name} of {path} is {size}: give 1 to {own[name]}, what the constructor makes")
        _set(module, {**own, **wanted}, path)
    after = _entries(model)
    if before > _RATIO * after + _FREE:
        raise ResizeError(f"{type(model).__name__} has {before} weights as built and {after} resized: is it damaged?")
    set_resized(model, resized)


def is_resized(value: Any) -> bool:
    """Whether ``value``, out of a file, has the form of ``model.resized``; its names are not looked up."""
    return isinstance(value, Mapping) and all(
        isinstance(path, str)
        and isinstance(entry, Mapping)
        and all(isinstance(name, str) and type(size) is int and 0 < size < _LARGEST for name, size in entry.items())
        for path, entry in value.items()
    )


def add_bias(module: nn.Module) -> nn.Parameter:
    """The bias of a layer, made of zeros where it has none."""
    if module.bias is None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        outputs = weight.shape[(axes(module) or (0, 1))[0]]
        module.bias = nn.Parameter(weight.new_zeros(outputs), weight.requires_grad)
    return module.bias  # type: ignore[return-value]


def _names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return ()
    for types, names in _NAMES:
        if isinstance(module, types):
            return names
    if is_conv1d(module):
        return ("nf", "nx")
    return tuple(name for name in (*HEADS, *WIDTHS) if type(getattr(module, name, None)) is int)


def _may_add_bias(module: nn.Module, name: str) -> bool:
    return name == NEW_BIAS and axes(module) is not None and getattr(module, "bias", 0) is None


def _set(module: nn.Module, wanted: Sizes, path: str) -> None:
    """Give ``module`` its sizes and tensors of the shapes that follow from them."""
    for name, size in wanted.items():
        if name != NEW_BIAS and getattr(module, name) != size:
            try:
                setattr(module, name, size)
            except AttributeError as error:
                raise ResizeError(f"{name} of {path} ({type(module).__name__}) cannot be set") from error
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.GroupNorm)):
        groups = wanted.get("groups", wanted.get("num_groups", 1))
        if any(size % groups for name, size in wanted.items() if name.endswith("channels")):
            raise ResizeError(f"{path} has {wanted}: channels are not divided by {groups} groups")
    shape = _shape(module)
    if shape is None:
        return
    outputs = shape[(axes(module) or (0, 1))[0]]
    if isinstance(module, _TRANSPOSED):
        outputs *= module.groups
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if not tensor.dim():
            continue
        empty = torch.zeros(shape if name == "weight" else (outputs,), dtype=tensor.dtype, device=tensor.device)
        trained = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(empty, tensor.requires_grad) if trained else empty)
    if NEW_BIAS in wanted:
        add_bias(module)


def _shape(module: Any) -> tuple[int, ...] | None:
    """The shape of the weight that a layer of these sizes has; None if it is no layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        return module.nx, module.nf
    if isinstance(module, _CONVOLUTIONS):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    if isinstance(module, _TRANSPOSED):
        return module.in_channels, module.out_channels // module.groups, *module.kernel_size
    names = _names(module)
    return (getattr(module, names[0]),) if isinstance(module, (*_NORMS, nn.GroupNorm, nn.PReLU)) else None


def _entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
