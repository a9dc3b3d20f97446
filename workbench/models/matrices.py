"""The parameters of a network that are matrices: which layer multiplies by each, and how it is laid out. Torch only.

A parameter is not always what a layer multiplies by. Under ``weight_norm`` that is ``g * v / ||v||``, under
``spectral_norm`` ``W / sigma``: the *product* of a parametrization. It is zero where v or W is, so these are the
matrices of such a layer. Of an unknown parametrization that is tried: masked at random, its product must be zero in the
same places, and there only.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from workbench.distributed.ranks import distributed
from workbench.models.wrappers import named_modules, submodule

Kind = Literal["linear", "convolution", "bilinear", "recurrent", "attention", "experts"]

_WEIGHT_NORM = parametrizations._WeightNorm  # pyright: ignore[reportPrivateUsage]
_SPECTRAL_NORM = parametrizations._SpectralNorm  # pyright: ignore[reportPrivateUsage]
_GATES = {"LSTM": 4, "GRU": 3}
_BACK = ("down", "w2", "out", "fc2", "c_proj")  # what maps an expert's hidden units back
_WORDS = {
    _WEIGHT_NORM: "weight_norm",
    _SPECTRAL_NORM: "spectral_norm",
    WeightNorm: "weight_norm",
    SpectralNorm: "spectral_norm",
}
_DIVIDED = (
    "which FSDP2 (fully_shard) divides, so that what the layer multiplies by cannot be computed from it: exclude it, "
    "or train it with DDP or without fully_shard"
)
_TRIED: "weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], bool]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter that holds one or several matrices.

    Attributes:
        layer: The module that multiplies by it, or by the product that is computed from it.
        attribute: Name of what the layer multiplies by, in the layer.
        parameter: The parameter.
        kind: What the layer is.
        experts: Number of matrices along the first dimension: of fused experts; 1 of other layers.
        parts: Number of matrices one below the other: the gates of a recurrent layer, queries, keys and values.
        transposed: Whether inputs come before outputs; None if that is not known.
        norm: Of ``weight_norm``, the dimension along which each slice has a norm of its own; -1 for one norm of all.
        made_by: The parametrization that the product is computed with, in words; None if there is none.
    """

    layer: nn.Module
    attribute: str
    parameter: nn.Parameter
    kind: Kind
    experts: int = 1
    parts: int = 1
    transposed: bool | None = False
    norm: int | None = None
    made_by: str | None = None

    def shapes(self) -> list[Sequence[int]]:
        """The shapes of its matrices, each (outputs, inputs, *kernel) in either order."""
        outputs, *rest = self.parameter.shape
        if self.kind == "experts":
            return [rest] * outputs
        return [[outputs // self.parts, *rest]] * self.parts

    def turned(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [outputs, inputs, *kernel], the experts one below the other.

        Linear and Conv layers have that order already; transformers' ``Conv1D`` has the opposite one, and transposed
        convolutions have it within each group. The inputs are those of one group.
        """
        if self.kind == "experts":
            return (tensor.transpose(1, 2) if self.transposed else tensor).flatten(0, 1)
        if self.kind == "convolution":
            return _swapped(tensor, self._groups) if self.transposed else tensor
        return tensor.T if self.transposed else tensor

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`turned`."""
        if self.kind == "experts":
            stacked = tensor.unflatten(0, (self.experts, -1))
            return stacked.transpose(1, 2) if self.transposed else stacked
        return self.turned(tensor)

    def turned_shape(self) -> torch.Size:
        """(outputs, inputs of a group, *kernel)."""
        return self.turned(torch.empty(self.parameter.shape, device="meta")).shape

    @property
    def _groups(self) -> int:
        groups = self.layer.groups
        assert isinstance(groups, int)
        return groups

    @property
    def grouped(self) -> bool:
        """Whether it is of a transposed convolution in groups, whose outputs do not lie along one dimension."""
        return self.kind == "convolution" and bool(self.transposed) and self._groups > 1

    @torch.no_grad()
    def product(self) -> Tensor:
        """What the layer multiplies by, of the parameter's shape: the parameter itself, or what is computed from it.

        The layer is left as it was: spectral norms are not estimated anew.
        """
        if self.made_by is None:
            return self.parameter.detach()
        if (hook := _hook(self.layer, self.attribute)) is not None:
            spectral = isinstance(hook, SpectralNorm)
            return hook.compute_weight(self.layer, False) if spectral else hook.compute_weight(self.layer)  # type: ignore[no-any-return]
        return _product(_parametrizations(self.layer)[self.attribute])

    def slices(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [slices, *], each of which has a norm; of ``weight_norm`` only."""
        assert self.norm is not None
        return tensor.flatten()[None] if self.norm < 0 else tensor.movedim(self.norm, 0).flatten(1)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Parameter name -> what it is, of all matrices that can be masked, under all their names without wrappers."""
    found: dict[str, Matrix] = {}
    for path, module in named_modules(model, remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            continue
        for name, matrix in _of_layer(module):
            found[f"{path}.{name}" if path else name] = matrix
    return found


def matrix_named(model: nn.Module, name: str) -> Matrix:
    """The matrix that a parameter of ``model`` holds.

    Raises:
        ValueError: If there is none of that name.
    """
    path, _, inner = name.rpartition(".")
    owner, _, tensor = path.rpartition(".")
    above, _, marker = owner.rpartition(".")
    if marker == "parametrizations":
        path, inner = above, f"parametrizations.{tensor}.{inner}"
    matrix = dict(_of_layer(submodule(model, path))).get(inner)
    if matrix is None:
        raise ValueError(f"'{name}' is no matrix of a layer that is known: it cannot be masked by structure")
    return matrix


def refusal(model: nn.Module, name: str) -> str:
    """Why a parameter is none of :func:`matrices`, in words."""
    path, _, attribute = name.rpartition(".")
    module = submodule(model, path)
    if (hook := _hook(module, attribute)) is not None and distributed(module.get_parameter(attribute)):
        return f"under {_words(hook)}, {_DIVIDED}"
    if isinstance(module, ParametrizationList):
        made_by = " and ".join(map(_words, module))
        if any(map(distributed, module.parameters())):
            return f"made by {made_by}, {_DIVIDED}"
        return f"made by {made_by}, whose result is not zero where this is"
    if _hook_refused(module, attribute):
        return "under torch.nn.utils.prune: call its remove() first"
    return f"of {type(module).__name__}, no layer that is known"


def _of_layer(module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """(name within the layer, matrix) of every matrix that ``module`` multiplies by."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if (hook := _hook(module, name)) is None:
            if name.removesuffix("_orig") == name or not _hook_refused(module, name):
                yield from _as_matrix(module, name, name, parameter)
        elif name == f"{hook.name}_{'v' if isinstance(hook, WeightNorm) else 'orig'}" and not distributed(parameter):
            norm = None if isinstance(hook, SpectralNorm) else _norm_dimension(hook.dim, parameter)
            yield from _as_matrix(module, hook.name, name, parameter, norm=norm, made_by=_words(hook))
    for attribute, chain in _parametrizations(module).items():
        if (original := _maskable_original(chain)) is None:
            continue
        parameter, first = getattr(chain, original), chain[0]
        norm = _norm_dimension(first.dim, parameter) if isinstance(first, _WEIGHT_NORM) else None
        name = f"parametrizations.{attribute}.{original}"
        yield from _as_matrix(module, attribute, name, parameter, norm=norm, made_by=_words(first))


def _as_matrix(
    module: nn.Module, attribute: str, name: str, parameter: nn.Parameter, **rest: Any
) -> Iterator[tuple[str, Matrix]]:
    """What the layer's ``attribute`` is, if a layer of this kind multiplies by it."""
    kind: Kind | None = None
    layout: dict[str, Any] = {}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        if attribute.startswith(("weight_ih", "weight_hh", "weight_hr")):
            kind = "recurrent"
            gates = next((n for word, n in _GATES.items() if word in (getattr(module, "mode", ""), _cell(module))), 1)
            layout["parts"] = 1 if attribute.startswith("weight_hr") else gates
    elif isinstance(module, nn.MultiheadAttention):
        if attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            kind, layout["parts"] = "attention", 3 if attribute == "in_proj_weight" else 1
    elif isinstance(module, _ConvNd):
        if attribute == "weight":
            kind, layout["transposed"] = "convolution", module.transposed
    elif (conv1d := _is_conv1d(module)) or isinstance(module, nn.Linear | nn.Bilinear):
        if attribute == "weight":
            # NonDynamicallyQuantizableLinear: the output of attention, which reads its weight without calling it
            attention = isinstance(module, NonDynamicallyQuantizableLinear)
            kind = "bilinear" if isinstance(module, nn.Bilinear) else "attention" if attention else "linear"
            layout["transposed"] = conv1d
    elif not _lazy(parameter) and _holds_experts(module, attribute, parameter):
        kind, layout = "experts", {"experts": len(parameter), "transposed": _inputs_first(module, attribute)}
    if kind is not None:
        yield name, Matrix(module, attribute, parameter, kind, **layout, **rest)


def _cell(module: nn.Module) -> str:
    """``LSTM`` or ``GRU`` of their cells."""
    return next((each.__name__.removesuffix("Cell") for each in type(module).__mro__ if each.__module__ == _RNN), "")


_RNN = nn.RNNBase.__module__


def _is_conv1d(module: nn.Module) -> bool:
    """Of transformers; parametrized, it is a subclass."""
    return any(each.__name__ == "Conv1D" for each in type(module).__mro__) and not isinstance(module, _ConvNd)


def named_as_no_matrix(attribute: str) -> bool:
    """Whether a parameter is called a bias, an embedding or a position."""
    return any(word in attribute.lower() for word in ("embed", "position", "bias"))


def _holds_experts(module: nn.Module, attribute: str, parameter: Tensor) -> bool:
    """Whether the parameter has a matrix of each expert; a network with experts may have 3-D tokens and positions."""
    if parameter.dim() != 3 or min(parameter.shape[1:]) < 2 or named_as_no_matrix(attribute):
        return False
    number = getattr(module, "num_experts", None)
    if isinstance(number, int):
        return len(parameter) == number
    name = type(module).__name__.lower()
    return len(parameter) > 1 and ("expert" in name or "moe" in name)


def _inputs_first(module: nn.Module, attribute: str) -> bool | None:
    """Whether experts are stored as [experts, inputs, outputs]; None if that is not known."""
    if isinstance(known := getattr(module, "is_transposed", None), bool):
        return known
    places = (module, getattr(module, "config", None))
    sizes = [getattr(place, name, None) for place in places for name in ("hidden_size", "hidden_dim", "input_size")]
    width = next((size for size in sizes if isinstance(size, int)), None)
    _, rows, columns = getattr(module, attribute).shape
    if width is None or (rows == width) == (columns == width):
        return None
    maps_back = any(word in attribute.lower() for word in _BACK)
    return (rows == width) != maps_back


def _swapped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _norm_dimension(dim: int | None, parameter: Tensor) -> int:
    """Along which slices have a norm of their own, from 0; -1 for one norm of all."""
    return -1 if dim is None or dim == -1 else dim % parameter.dim()


def _words(parametrization: Any) -> str:
    return _WORDS.get(type(parametrization), type(parametrization).__name__)


def _lazy(parameter: Any) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


# Parametrizations of old: a hook that computes the product before every call


def _hook(module: nn.Module, name: str) -> Any:
    """The hook of ``weight_norm`` or ``spectral_norm`` that ``name``, a parameter or the product, belongs to."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and name in (hook.name, f"{hook.name}_g", f"{hook.name}_v"):
            return hook
        if isinstance(hook, SpectralNorm) and name in (hook.name, f"{hook.name}_orig"):
            return hook
    return None


def _hook_refused(module: nn.Module, name: str) -> bool:
    """Whether the parameter is under a mask of ``torch.nn.utils.prune``."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(each, BasePruningMethod) and name == f"{each._tensor_name}_orig" for each in hooks)


# Parametrizations of today: a list of modules, each computing from the result of the one before


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """Name of the product -> what it is computed by."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: chain for name, chain in lists.items() if isinstance(chain, ParametrizationList)}


def _maskable_original(chain: Any) -> str | None:
    """The parameter to mask so that the product is zero in the same places; None if there is none."""
    if any(map(distributed, chain.parameters())):
        return None
    if len(chain) == 1 and isinstance(chain[0], _WEIGHT_NORM):
        return "original1"
    if len(chain) == 1 and isinstance(chain[0], _SPECTRAL_NORM):
        return "original"
    return "original" if chain.is_tensor and _keeps_zeros(chain) else None


@torch.no_grad()
def _product(chain: Any) -> Tensor:
    return copy.deepcopy(chain).eval()().detach()


def _keeps_zeros(chain: Any) -> bool:
    """Whether the product is zero where the original is, and there only: tried with random masks, once a layer."""
    original = chain.original
    if not original.is_floating_point() or original.is_meta or original.numel() < 2:
        return False
    tried = (original.shape, original.dtype, *map(type, chain))
    if (known := _TRIED.get(chain)) is None or known[0] != tried:
        try:
            _TRIED[chain] = known = (tried, _try_zeros(chain))
        except Exception:  # anything that a parametrization of someone's own raises, copied or called
            _TRIED[chain] = known = (tried, False)
    return known[1]


@torch.no_grad()
def _try_zeros(chain: Any) -> bool:
    original, generator = chain.original, torch.Generator().manual_seed(0)
    trial = copy.deepcopy(chain).eval()
    for _ in range(2):
        mask = (torch.rand(original.shape, generator=generator) < 0.5).to(original.device)
        trial.original.copy_(torch.where(mask, 1 + original.abs(), 0))
        product = trial()
        if product.shape != original.shape or bool(((product == 0) & mask).any()) or bool(product[~mask].any()):
            return False
    return True
