"""Attention layers that make queries, keys and values at once, split as their class lays them out. Torch only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("query", "key", "value")
"""What of a fused layer can be captured by name."""

_NAMES = ("c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "in_proj", "to_qkv", "W_pack")
# Queries of all heads, then keys, then values.
_SIDE_BY_SIDE = (
    "BlipAttention",
    "DecisionTransformerGPT2Attention",
    "GPT2Attention",
    "ImageGPTAttention",
    "ModernBertAttention",
    "MptAttention",
    "SamVisionAttention",
)
# Query, key and value of one head, then those of the next.
_BY_HEAD = ("BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention")
# Classes with a name that others have as well, by the beginning of their module.
_ATTENTION_OF = ("transformers.models.openai.", "timm.")


def is_fused(path: str) -> bool:
    """Whether a layer's name says that it makes queries, keys and values at once."""
    return path.rpartition(".")[2] in _NAMES


def check_relation(path: str) -> None:
    """Refuse a fused layer where queries, keys or values are to be compared.

    Args:
        path: A layer as :func:`distill.features.capture` names it, or a pattern.

    Raises:
        ValueError: If it is a fused layer, and it is not said which part.
    """
    layer, _, side = path.partition(":")
    if side in ("", "output") and is_fused(layer):
        raise ValueError(
            f"'{path}' makes queries, keys and values at once, and a relation compares one of them: name it, "
            f"'{layer}:query', '{layer}:key' or '{layer}:value'"
        )


def split(owner: nn.Module | None, path: str, output: Tensor, part: str) -> Tensor:
    """The queries, keys or values in the output of a fused layer.

    Args:
        owner: The attention module that the layer belongs to.
        path: The layer's path.
        output: [..., widths of all three].
        part: "query", "key" or "value", of a class whose layout is known; or "1/3", "2/3", "3/3" and the like, one of
            equal parts side by side.

    Returns:
        [..., heads * width of a head], the heads side by side. Grouped queries have more heads than keys and values.

    Raises:
        ValueError: If the layout is not known, or does not fit the output.
    """
    if part not in PARTS:
        number, count = map(int, part.split("/"))
        if output.shape[-1] % count:
            raise ValueError(f"'{path}' is {output.shape[-1]} wide, which has no {count} equal parts")
        return output.chunk(count, -1)[number - 1]
    index, width = PARTS.index(part), output.shape[-1]
    if (sizes := _sizes(owner, width)) is not None and sum(sizes) == width:
        return output.split(sizes, -1)[index]
    if (groups := _groups(owner)) is not None:
        count, queries = groups
        if width % (count * (queries + 2)) == 0:
            heads = output.unflatten(-1, (count, queries + 2, -1))
            return heads[..., :-2, :].flatten(-3) if index == 0 else heads[..., index - 3, :].flatten(-2)
    raise ValueError(
        f"how '{path}' of {type(owner).__name__}, {width} wide, lays out queries, keys and values is not known: if "
        f"they are equal parts side by side, name '{path}:1/3', '{path}:2/3' or '{path}:3/3'; else let the model call "
        "an nn.Identity on each, and name these"
    )


def projected(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: str) -> Tensor:
    """Queries, keys or values [B, L, D] of torch's attention, which makes them inside of a function.

    Raises:
        ValueError: If the part is none of these.
    """
    if part not in PARTS:
        raise ValueError(f"torch's MultiheadAttention has {', '.join(PARTS)}, and no {part!r}")
    index = PARTS.index(part)
    inputs: Any = args[index] if index < len(args) else kwargs[part]
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight.chunk(3)[index]
    else:
        weight = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[index]
    bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[index]
    found = F.linear(inputs, weight, bias)
    return found if module.batch_first or found.ndim < 3 else found.transpose(0, 1)


def splitter(owner: nn.Module | None, module: nn.Module, path: str, part: str) -> Callable[[Any, Any, Any], Tensor]:
    """(args, kwargs, output) of a layer -> the part of it."""
    if isinstance(module, nn.MultiheadAttention):
        return lambda args, kwargs, output: projected(module, args, kwargs, part)
    return lambda args, kwargs, output: split(owner, path, output, part)


def _kinds(owner: nn.Module | None) -> set[str]:
    return {cls.__name__ for cls in type(owner).__mro__}


def _sizes(owner: Any, width: int) -> tuple[int, int, int] | None:
    """Widths of queries, keys and values that stand side by side."""
    kinds, where = _kinds(owner), type(owner).__module__
    if "Phi3Attention" in kinds:
        keys = owner.num_key_value_heads * owner.head_dim
        return width - 2 * keys, keys, keys
    if "GPTBigCodeAttention" in kinds and owner.multi_query:
        return owner.embed_dim, owner.kv_dim, owner.kv_dim
    thirds = not kinds.isdisjoint(_SIDE_BY_SIDE) or ("Attention" in kinds and where.startswith(_ATTENTION_OF))
    # Cross-attention has keys and values only.
    third = width // 3
    return (third, third, third) if thirds and not getattr(owner, "is_cross_attention", False) else None


def _groups(owner: Any) -> tuple[int, int] | None:
    """How many groups of heads there are, and queries in each, with one key and one value."""
    kinds = _kinds(owner)
    config = getattr(owner, "config", None)
    heads = next(
        (
            count
            for source in (owner, config)
            for name in ("num_heads", "num_attention_heads")
            if isinstance(count := getattr(source, name, None), int)
        ),
        None,
    )
    if heads is None:
        return None
    if "FalconAttention" in kinds:
        if owner.new_decoder_architecture:
            return owner.num_kv_heads, heads // owner.num_kv_heads
        return (1, heads) if owner.multi_query else (heads, 1)
    return (heads, 1) if not kinds.isdisjoint((*_BY_HEAD, "GPTBigCodeAttention")) else None
