"""Where transformers have their attention and feed-forward nets. Imports torch only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from workbench.models.wrappers import named_modules, submodule, unwrap

KINDS = (
    "BERT, RoBERTa, DistilBERT, GPT-2, ViT, Segformer and Llama of transformers, workbench.models.Transformer, and "
    "what is laid out as they are"
)


@dataclass(frozen=True)
class Anatomy:
    """Where a transformer's base model has its layers, and a layer its parts.

    Attributes:
        layers: The list of layers.
        inputs: The layers of queries, keys and values: three, or one for all, in this order.
        output: What maps the heads back to the hidden size.
        up: First layer of the feed-forward net.
        down: Second layer of it.
        ffn: The configuration's field for its width.
        gate: What multiplies the outputs of ``up``, unit by unit, in a gated net.
        between: A depthwise convolution between ``up`` and ``down``.
    """

    layers: str
    inputs: tuple[str, ...]
    output: str
    up: str
    down: str
    ffn: str = "intermediate_size"
    gate: str | None = None
    between: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """All of a layer's, by their paths in it."""
        return (*self.inputs, self.output, self.up, self.down, *filter(None, (self.gate, self.between)))


def _three(pattern: str, names: str = "query key value") -> tuple[str, ...]:
    return tuple(pattern.format(name) for name in names.split())


ANATOMIES = (
    # BERT, RoBERTa
    Anatomy(
        "encoder.layer", _three("attention.self.{}"), "attention.output.dense", "intermediate.dense", "output.dense"
    ),
    # ViT of the first transformers 5
    Anatomy(
        "encoder.layer",
        _three("attention.attention.{}"),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    # Segformer: before ViT, which has the same parts but for the convolution
    Anatomy(
        "blocks",
        _three("attention.{}_proj", "q k v"),
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
        between="mlp.dwconv.dwconv",
    ),
    # ViT
    Anatomy("layers", _three("attention.{}_proj", "q k v"), "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    # DistilBERT
    Anatomy(
        "transformer.layer",
        _three("attention.{}_lin", "q k v"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "hidden_dim",
    ),
    # GPT-2
    Anatomy("h", ("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "n_inner"),
    # Llama, Mistral, Qwen
    Anatomy(
        "layers",
        _three("self_attn.{}_proj", "q k v"),
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        gate="mlp.gate_proj",
    ),
    # workbench.models.Transformer, gated: before the plain one, which has the same parts but for the gate
    Anatomy(
        "layers",
        _three("attention.{}"),
        "attention.output",
        "feed_forward.up",
        "feed_forward.down",
        gate="feed_forward.gate",
    ),
    Anatomy("layers", _three("attention.{}"), "attention.output", "feed_forward.up", "feed_forward.down"),
)


def anatomy_of(model: nn.Module) -> Anatomy | None:
    """How a model of transformers is laid out; None if it is none of these."""
    base, config = base_of(model), getattr(unwrap(model, adapters=True), "config", None)
    if base is None or not hasattr(config, "num_hidden_layers"):
        return None
    for anatomy in ANATOMIES:
        layers = at(base, anatomy.layers)
        if isinstance(layers, nn.ModuleList) and len(layers) and _has_all(layers[0], anatomy):
            return anatomy
    return None


def base_of(model: nn.Module) -> nn.Module | None:
    """The model without its head; None if it is not one of transformers."""
    model = unwrap(model, adapters=True)
    prefix = getattr(model, "base_model_prefix", None)
    return None if prefix is None else unwrap(getattr(model, prefix, model), adapters=True)


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, if there is one."""
    try:
        return submodule(module, path)
    except AttributeError:
        return None


class Layer(NamedTuple):
    """A layer of a transformer that is somewhere in a model.

    Attributes:
        path: Its path in the model.
        module: Itself.
        anatomy: Where its parts are in it.
        width: How many queries a head has.
    """

    path: str
    module: nn.Module
    anatomy: Anatomy
    width: int


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """The layers of all transformers anywhere in ``model``, which may be or hold or wrap several.

    Raises:
        ValueError: If the width of a head is unknown.
    """
    for path, module in named_modules(model):
        anatomy = next((anatomy for anatomy in ANATOMIES if _has_all(module, anatomy)), None)
        if anatomy is not None:
            yield Layer(path, module, anatomy, _head_width(model, path, anatomy))


def _has_all(layer: nn.Module, anatomy: Anatomy) -> bool:
    return all(at(layer, path) is not None for path in anatomy.parts)


def _head_width(model: nn.Module, path: str, anatomy: Anatomy) -> int:
    """From the attention, else from the nearest configuration around it."""
    steps = [*(path.split(".") if path else []), *anatomy.inputs[0].split(".")[:-1]]
    for depth in range(len(steps), -1, -1):
        module: Any = submodule(model, ".".join(steps[:depth]))
        config: Any = getattr(module, "config", None)
        for holder, names in ((module, ("attention_head_size", "head_dim")), (config, ("head_dim",))):
            for name in names:
                if isinstance(width := getattr(holder, name, None), int):
                    return width
        if hasattr(config, "hidden_size") and hasattr(config, "num_attention_heads"):
            return config.hidden_size // config.num_attention_heads
    raise ValueError(f"the width of the heads of '{path}' is unknown: prune the model that has its configuration")
