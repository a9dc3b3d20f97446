"""Activations: one table, and what initialisation and analysis need to know about each row.

Moments are over a Gaussian pre-activation Z, by Gauss-Legendre quadrature in float64 with the panels split at
the origin, where the piecewise rows have their kink and the smooth ones their bend.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, TypeVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.arguments import check_choice

Init = Literal["own", "he"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Activation:
    """One row of the table.

    Attributes:
        name: The name used everywhere in this project.
        module: Makes a fresh module.
        function: The same thing on tensors, elementwise, any floating dtype.
        smooth: Infinitely differentiable; otherwise put together from pieces (ReLU from lines, ELU with a
            jump in f'').
        hub_keys: Values of a transformers configuration that mean this function or an approximation of it;
            the first is the one to write, none if transformers cannot build it.
        hub_classes: Classes of ``transformers.activations`` that do.
    """

    name: str
    module: Callable[[], nn.Module]
    function: Callable[[Tensor], Tensor]
    smooth: bool
    hub_keys: tuple[str, ...] = ()
    hub_classes: tuple[str, ...] = ()


_gelu_tanh = partial(F.gelu, approximate="tanh")

TABLE: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("relu", nn.ReLU, F.relu, False, ("relu",)),
        Activation(
            "gelu",
            nn.GELU,
            F.gelu,
            True,
            ("gelu", "gelu_python", "quick_gelu"),
            ("GELUActivation", "QuickGELUActivation"),
        ),
        Activation(
            "gelu_tanh",
            partial(nn.GELU, approximate="tanh"),
            _gelu_tanh,
            True,
            ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
            (
                "GELUTanh",
                "PytorchGELUTanh",
                "NewGELUActivation",
                "FastGELUActivation",
                "AccurateGELUActivation",
            ),
        ),
        Activation("silu", nn.SiLU, F.silu, True, ("silu", "swish"), ("SiLUActivation",)),
        Activation("mish", nn.Mish, F.mish, True, ("mish",), ("MishActivation",)),
        Activation("elu", nn.ELU, F.elu, False),
        Activation("tanh", nn.Tanh, torch.tanh, True, ("tanh",)),
        Activation("softplus", nn.Softplus, F.softplus, True),
        Activation("identity", nn.Identity, torch.clone, True, ("linear",), ("LinearActivation",)),
    )
}
"""ReLU; GELU (exact, by erf) and its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415); SiLU
(Elfwing et al. 2018, arXiv:1702.03118); Mish (Misra 2019, arXiv:1908.08681); ELU, alpha = 1 (Clevert et al.
2016, arXiv:1511.07289); tanh; softplus, beta = 1; and the identity, as the linear control."""

_TORCH_CLASSES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.ELU: "elu",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
}
_HUB_CLASSES = {cls: row.name for row in TABLE.values() for cls in row.hub_classes}
_HUB_KEYS = {key: row.name for row in TABLE.values() for key in row.hub_keys}
_CONFIG_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def names() -> tuple[str, ...]:
    """The names of all rows, in the order of the table."""
    return tuple(TABLE)


def spec(name: str) -> Activation:
    """The row of the table called ``name``.

    Raises:
        ValueError: There is none; the message gives the nearest names and all of them.
    """
    if name in TABLE:
        return TABLE[name]
    text = str(name).lower().replace("-", "_")
    near = [_HUB_KEYS[text]] if text in _HUB_KEYS else difflib.get_close_matches(text, TABLE)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown activation {name!r}.{hint} Use one of {', '.join(TABLE)}.")


def make(name: str) -> nn.Module:
    """A fresh activation module, elementwise and without parameters."""
    return spec(name).module()


@cache
def _legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(24)
    return torch.tensor(nodes, device="cpu"), torch.tensor(weights, device="cpu")


def _gaussian(mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Nodes x [N] and weights [N], float64, with E g(X) ~ sum(weights * g(x)) for X ~ N(mean, std^2).

    Panels: unit steps of Z = (X - mean) / std over +-10, cut at X = 0 and at +-2^k around it, so that a bend
    of width one near X = 0 is resolved however wide the Gaussian is.
    """
    bends = {0.0, *(sign * 2.0**k for k in range(-2, 6) for sign in (-1, 1))}
    cuts = {float(i) for i in range(-10, 11)} | {(x - mean) / std for x in bends}
    edges = torch.tensor(sorted(c for c in cuts if abs(c) <= 10), dtype=torch.float64, device="cpu")
    half, middle = edges.diff() / 2, (edges[1:] + edges[:-1]) / 2
    nodes, weights = _legendre()
    z = (middle[:, None] + half[:, None] * nodes).flatten()
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return mean + std * z, (half[:, None] * weights).flatten() * density


@cache
def gain(name: str) -> float:
    """The gain 1 / sqrt(E f(Z)^2), Z ~ N(0, 1), that keeps the second moment of pre-activations.

    With weights N(0, gain^2 / fan_in) reading f(Z), the next pre-activation again has unit second moment:
    sqrt 2 for ReLU, 1.5335 for GELU. Unlike ReLU's, this fixed point is unstable for GELU, SiLU and Mish (a
    second moment of 0.95 in front of 30 GELU layers is 0.018 behind them): deep nets need a norm layer
    besides.

    Raises:
        ValueError: Unknown name.
    """
    x, weights = _gaussian(0.0, 1.0)
    with torch.inference_mode(False), torch.no_grad():
        return float((weights * spec(name).function(x) ** 2).sum()) ** -0.5


@lru_cache(maxsize=4096)
def gate(name: str, mean: float = 0.0, std: float = 1.0) -> tuple[float, float]:
    """The Gaussian moments (E f'(Z), E f'(Z)^2), Z ~ N(mean, std^2), of an activation's derivative.

    The first is 1/2 at mean 0 for every x g(x) with g(x) + g(-x) = 1 (ReLU, GELU, SiLU); the second is what
    one layer does to a squared gradient, apart from its weights. Absolute error below 1e-9.

    Args:
        name: A row of the table.
        mean: Mean of the pre-activation.
        std: Its standard deviation, above 0.

    Raises:
        ValueError: Unknown name, or a mean or deviation out of range.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"mean={mean}, std={std}: give a finite mean and a finite std above 0.")
    nodes, weights = _gaussian(float(mean), float(std))
    with torch.inference_mode(False), torch.enable_grad():
        x = nodes.clone().requires_grad_()
        (slope,) = torch.autograd.grad(spec(name).function(x).sum(), x)
        return float((weights * slope).sum()), float((weights * slope**2).sum())


@final
class GLU(nn.Module):
    """Gated linear unit: down(f(gate(x)) * up(x)); [..., features] -> [..., out].

    Three matrices where a plain block has two: `glu_width` gives the hidden width of equal size. Shazeer
    (2020), "GLU variants improve Transformer", arXiv:2002.05202.

    Args:
        features: Size of the last axis of the input.
        hidden: Width of the gated layer.
        out: Size of the last axis of the output.
        activation: f, a row of the table.
        bias: Whether the three maps have biases.
    """

    def __init__(self, features: int, hidden: int, out: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(features, hidden, bias=bias)
        self.up = nn.Linear(features, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)
        self.activation = make(activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., out]."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


def SwiGLU(features: int, hidden: int, out: int, bias: bool = False) -> GLU:
    """A `GLU` gated by SiLU."""
    return GLU(features, hidden, out, "silu", bias)


def GEGLU(features: int, hidden: int, out: int, bias: bool = False) -> GLU:
    """A `GLU` gated by the exact GELU."""
    return GLU(features, hidden, out, "gelu", bias)


def glu_width(hidden: int, multiple: int = 1) -> int:
    """The hidden width, 2/3 of ``hidden``, that makes a GLU as large as a plain two-matrix block.

    Rounded to the nearest multiple of ``multiple`` and at least one of it. Exact for input and output of any
    one size.

    Raises:
        ValueError: An argument below 1.
    """
    if hidden < 1 or multiple < 1:
        raise ValueError(f"hidden={hidden}, multiple={multiple}: both must be at least 1.")
    return max(1, (4 * hidden + 3 * multiple) // (6 * multiple)) * multiple


def init_(module: M, activation: str, kind: Init = "own") -> M:
    """Draw, in place, the weights of a chain of linear and convolutional layers from N(0, gain^2 / fan_in).

    The gain belongs to layers that *read* an activation. kind "own": `gain` of the activation; 1 for the
    first layer in order of registration and for the gate and up maps of a `GLU`, which read inputs instead.
    He et al. (2015, arXiv:1502.01852, section 2.2) say the same and use sqrt 2 there too, because for ReLU
    the factor stays a factor; behind 30 GELU layers it would be 189. kind "he": sqrt 2 everywhere, as they
    do, for any activation.
    Both: 1 for the last layer, the output (a lone `GLU` has none); biases 0. Norm layers and all else stay as
    they are.

    The draws come from torch's global generator in an order that depends on the shapes only, so one seed
    gives every activation the same weights up to the gains.

    Args:
        module: Holds the layers (Linear, Conv1d, Conv2d, Conv3d).
        activation: The activation between them.
        kind: "own" or "he".

    Returns:
        The module.

    Raises:
        ValueError: Unknown activation or kind, or a module without such a layer.
    """
    check_choice(Init, init=kind)
    hidden = gain(activation) if kind == "own" else math.sqrt(2)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no Linear or Conv layer to initialise: pass a module with one.")
    readers = {id(m) for block in module.modules() if isinstance(block, GLU) for m in (block.gate, block.up)}
    readers.add(id(layers[0]))
    for layer in layers:
        output = layer is layers[-1] and not isinstance(module, GLU)
        factor = 1.0 if output or (kind == "own" and id(layer) in readers) else hidden
        nn.init.normal_(layer.weight, 0.0, factor / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def kind_of(module: nn.Module) -> str | None:
    """The row that a torch or transformers activation module computes or approximates, or None.

    ``nn.Identity`` is None as well: it mostly marks the place of a layer that was taken out.
    """
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__module__ == "transformers.activations":
        return _HUB_CLASSES.get(type(module).__name__)
    return next((name for cls, name in _TORCH_CLASSES.items() if isinstance(module, cls)), None)


def _config_kinds(config: Any) -> dict[str, str | None]:
    """By field the row, for those fields of a transformers configuration that name its activation."""
    keys = {field: getattr(config, field, None) for field in _CONFIG_FIELDS} if hasattr(config, "to_dict") else {}
    return {field: _HUB_KEYS.get(key) for field, key in keys.items() if isinstance(key, str)}


def _sites(parent: nn.Module, allowed: set[str] | None, seen: set[int]) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of every activation to replace, found before anything is changed."""
    if id(parent) in seen:
        return
    seen.add(id(parent))
    if kinds := _config_kinds(getattr(parent, "config", None)):
        own = {*kinds.values(), getattr(parent, "swapped_activation", None)} - {None}
        allowed = (allowed or set()) | {str(kind) for kind in own}
    if allowed is not None and type(parent).__name__.endswith("Pooler"):
        return  # its tanh is written out, not configured
    for attribute, value in vars(parent).items():
        name = next((row.name for row in TABLE.values() if value is row.function), None)
        if name is not None and (allowed is None or name in allowed):
            yield parent, attribute
    for attribute, child in parent._modules.items():  # named_children() gives a shared module once
        name = kind_of(child) if child is not None else None
        if child is not None and name is None:
            yield from _sites(child, allowed, seen)
        elif name is not None and (allowed is None or name in allowed):
            yield parent, attribute


def swap_activation(model: M, name: str) -> M:
    """Replace, in place, every activation of a model by another.

    It replaces the modules that `kind_of` knows, and functions of the table that are held as attributes
    (``nn.TransformerEncoderLayer``); it cannot see functions that a ``forward`` calls directly. Under a transformers
    configuration with ``hidden_act``, ``hidden_activation``, ``activation_function`` or ``activation``, only
    the activation it names is replaced, so that BERT's pooler keeps its tanh, and the configuration is edited
    in place (give teacher and student one each) where transformers knows the new one by name.

    What a checkpoint needs to rebuild the model is noted on it: ``init_args["activation"]`` of the model and
    of submodules that have it; otherwise ``model.swapped_activation = name``, to be swapped again after
    building.

    Args:
        model: The model.
        name: The row of the table to put in.

    Returns:
        The model.

    Raises:
        ValueError: Unknown name, or nothing in the model to replace; the model is then unchanged.
    """
    row = spec(name)
    sites = list(_sites(model, None, set()))
    if not sites:
        raise ValueError(
            f"no activation to replace in {type(model).__name__}: supported are the modules of "
            f"{', '.join(n for n in TABLE if n != 'identity')}. Build the model with one of them."
        )
    fresh: dict[int, nn.Module] = {}  # a module used in several places stays one module
    for parent, attribute in sites:
        old = getattr(parent, attribute)
        new = fresh.setdefault(id(old), row.module()) if isinstance(old, nn.Module) else row.module()
        setattr(parent, attribute, new.train(parent.training))
        if hasattr(parent, "activation_relu_or_gelu"):
            # Torch's fused encoder trusts this flag, not the module.
            setattr(parent, "activation_relu_or_gelu", 0)  # noqa: B010
    for module in model.modules():
        arguments = getattr(module, "init_args", None)
        if isinstance(arguments, dict) and "activation" in arguments:
            arguments["activation"] = name
        elif kinds := _config_kinds(getattr(module, "config", None)):
            module.swapped_activation = name  # type: ignore[assignment]
            for field in (f for f, kind in kinds.items() if kind is not None and row.hub_keys):
                setattr(module.config, field, row.hub_keys[0])
    arguments = getattr(model, "init_args", None)
    if not (isinstance(arguments, dict) and "activation" in arguments):
        model.swapped_activation = name  # type: ignore[assignment]
    return model
