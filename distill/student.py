"""A student cut from its teacher: fewer layers, narrower ones, another activation; the rest of the weights kept."""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.teacher import Teacher
from workbench.activations import swap_activation
from workbench.models import MLP, SentenceEncoder
from workbench.source import Source

Sizes = tuple[int, int, int]  # hidden, heads, feed-forward
Picks = dict[str, list[tuple[int, Tensor]]]  # tensor: (axis, indices to keep along it)
Scales = dict[str, tuple[int, int, float]]  # tensor: (axis, length, factor of that many entries along it)


@dataclass(frozen=True)
class _Layout:
    """Where a transformer's base model has its layers, and a layer its parts.

    Attributes:
        layers: The list of layers.
        inputs: What makes queries, keys and values: three parts, or one that makes them in this order.
        output: What maps the heads back to the hidden size.
        up: First layer of the feed-forward net.
        down: Second layer of it.
        ffn: The configuration's field for its width.
    """

    layers: str
    inputs: tuple[str, ...]
    output: str
    up: str
    down: str
    ffn: str = "intermediate_size"


def _three(pattern: str, names: str = "query key value") -> tuple[str, ...]:
    return tuple(pattern.format(name) for name in names.split())


_LAYOUTS = (
    # BERT, RoBERTa
    _Layout(
        "encoder.layer", _three("attention.self.{}"), "attention.output.dense", "intermediate.dense", "output.dense"
    ),
    # ViT of the first transformers 5
    _Layout(
        "encoder.layer",
        _three("attention.attention.{}"),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    # ViT
    _Layout("layers", _three("attention.{}_proj", "q k v"), "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    # DistilBERT
    _Layout(
        "transformer.layer",
        _three("attention.{}_lin", "q k v"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "hidden_dim",
    ),
    # GPT-2
    _Layout("h", ("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "n_inner"),
)


def cut_student(
    teacher: nn.Module | Teacher | Source | Path,
    layers: Sequence[int] | None = None,
    every: int | None = None,
    hidden: int | Sequence[int] | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    r"""A smaller network made of the teacher's own weights.

    ::

        cut_student(teacher, layers=[1, 3, 5])                   # these three layers, all else as it is
        cut_student(teacher, every=2, hidden=192, heads=6, ffn=768, activation="relu")

    Tensors whose shape stays are copied. Of the others the most important units are kept, in their order, ties to the
    lower index; w is a row or column of a teacher's weight (a row with its bias), all norms are L2:

    - hidden units, one choice for the whole model: :math:`\sum |\gamma_u| \sum \|w_u\|`, the gains of its norms, in
      the layers kept and around them, times the matrices of embeddings and heads. (Not the matrices in the layers:
      where those of a trained encoder are large, the gains are small, and their sum chooses worse than chance.)
    - heads, in each layer: the norm of the columns by which the output projection reads the head;
    - where heads get narrower, the dimensions of each: :math:`\|q_d\| \|k_d\|` for queries and keys,
      :math:`\|v_d\| \|o_d\|` for values. Queries are scaled so that scores are still divided by the teacher's root;
    - feed-forward units, in each layer: :math:`\|in_u\| \|out_u\|`; the hidden units of an MLP likewise.

    BERT, RoBERTa, DistilBERT, GPT-2 and ViT of transformers, what is laid out as they are, and a
    :class:`workbench.models.SentenceEncoder` around one: a head is hidden / heads wide. ``hidden`` alone narrows every
    head and ``heads`` alone keeps their width, so that hidden becomes heads times it; with both, heads may get narrower
    but not wider. ``ffn`` is kept unless given.

    An :class:`workbench.models.MLP`: layers are its hidden layers, and ``hidden`` is their width or widths. Of any
    other network only the activation can be changed.

    Args:
        teacher: The network, which is not changed; or a Teacher, or where to load one from.
        layers: Indices from 0, ascending: exactly these layers. All if None.
        every: Instead of ``layers``, the first of every so many: 2 keeps 0, 2, 4, ...
        hidden: Hidden size.
        heads: Attention heads of a layer.
        ffn: Width of the feed-forward nets.
        activation: A row of :mod:`workbench.activations`, put in place of the teacher's.

    Returns:
        A trainable network of the teacher's class in train mode, on its device and in its precision, with a
        configuration (``config`` or ``init_args``) from which it can be saved and loaded. Tied weights are tied.

    Raises:
        ValueError: If the teacher is not of a kind that can be cut so, or a size is larger than the teacher's or
            cannot be expressed by its class.

    Source: Sanh et al. 2019, arXiv:1910.01108, section 3 (one layer of two); Michel et al. 2019, arXiv:1905.10650, and
    Muralidharan et al. 2024, arXiv:2407.14679, section 2.2, for the widths, with norms of weights as importance.
    """
    if not isinstance(teacher, nn.Module):
        teacher = teacher.module if isinstance(teacher, Teacher) else Teacher(teacher).module
    if isinstance(teacher, SentenceEncoder):
        inner = cut_student(teacher.encoder, layers, every, hidden, heads, ffn, activation)
        return SentenceEncoder(inner, teacher.pooling, teacher.normalize).train()
    if isinstance(teacher, MLP):
        _refuse(teacher, {"heads": heads, "ffn": ffn}, "hidden, layers, every and activation")
        student = _cut_mlp(teacher, layers, every, hidden)
    elif (layout := _layout(teacher)) is not None:
        if isinstance(hidden, Sequence):
            raise ValueError(f"hidden={list(hidden)}: a transformer has one hidden size, give a number")
        student = _cut_transformer(teacher, layout, layers, every, hidden, heads, ffn)
    else:
        given = {"layers": layers, "every": every, "hidden": hidden, "heads": heads, "ffn": ffn}
        _refuse(teacher, given, "activation; others of BERT, RoBERTa, DistilBERT, GPT-2, ViT and workbench.models.MLP")
        student = copy.deepcopy(teacher)
    if activation is not None:
        swap_activation(student, activation)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student.train()


def _refuse(teacher: nn.Module, given: dict[str, Any], allowed: str) -> None:
    if odd := [f"{name}={value}" for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(odd)}: of a {type(teacher).__name__} can be changed {allowed}")


def _chosen(count: int, layers: Sequence[int] | None, every: int | None) -> list[int]:
    """The layers to keep, out of ``count``."""
    if layers is not None and every is not None:
        raise ValueError(f"layers={list(layers)} and every={every}: give one of them")
    if every is not None and not 1 <= every <= max(count, 1):
        raise ValueError(f"every={every}: the teacher has {count} layers, give 1 to {count}")
    if layers is None:
        return list(range(0, count, every or 1))
    chosen = list(layers)
    if odd := [layer for layer in chosen if not 0 <= layer < count]:
        raise ValueError(f"layers={chosen}: the teacher has no layer {odd[0]}, only 0 to {count - 1}")
    if not chosen or any(a >= b for a, b in pairwise(chosen)):
        raise ValueError(f"layers={chosen}: give at least one, each once and in ascending order")
    return chosen


def _keep(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores along the last axis, ascending; ties to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def _norm(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """L2 norms of the rows [out, ...], each with its bias; in float64."""
    rows = weight.detach().double().flatten(1)
    if bias is not None:
        rows = torch.cat([rows, bias.detach().double()[:, None]], 1)
    return rows.norm(dim=1)


def _layout(teacher: nn.Module) -> _Layout | None:
    base = _base(teacher)
    if base is None or not hasattr(getattr(teacher, "config", None), "num_hidden_layers"):
        return None
    for layout in _LAYOUTS:
        blocks = _at(base, layout.layers)
        parts = (*layout.inputs, layout.output, layout.up, layout.down)
        if isinstance(blocks, nn.ModuleList) and len(blocks) and all(_at(blocks[0], part) for part in parts):
            return layout
    return None


def _base(model: nn.Module) -> nn.Module | None:
    """The model without its head; None if it is not one of transformers."""
    prefix = getattr(model, "base_model_prefix", None)
    return None if prefix is None else getattr(model, prefix, model)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _cut_transformer(
    teacher: nn.Module,
    layout: _Layout,
    layers: Sequence[int] | None,
    every: int | None,
    hidden: int | None,
    heads: int | None,
    ffn: int | None,
) -> nn.Module:
    base: Any = _base(teacher)
    config: Any = copy.deepcopy(teacher.config)
    blocks: Any = _at(base, layout.layers)
    chosen = _chosen(len(blocks), layers, every)
    width = _matrix(blocks[0], layout.up)[0].shape[0]
    before = (config.hidden_size, config.num_attention_heads, width)
    after = (*_hidden_and_heads(config, hidden, heads), width if ffn is None else _smaller("ffn", ffn, width))
    if before != after and getattr(config, "add_cross_attention", False):
        raise ValueError("hidden, heads and ffn cannot be cut with cross-attention to another model: cut layers only")
    config.num_hidden_layers = len(chosen)
    if before != after:
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            config.pooler_output_size = after[0]
        config.hidden_size, config.num_attention_heads = after[:2]
        setattr(config, layout.ffn, after[2])
    student = _built(teacher, config)
    prefix = next(name for name, module in teacher.named_modules() if module is blocks)
    picks, scales = _picks(blocks, layout, prefix, chosen, before, after, teacher.config)
    renamed = {f"{prefix}.{new}.": f"{prefix}.{old}." for new, old in enumerate(chosen)}
    _fill(student, teacher, prefix, renamed, picks, scales, (before[0], after[0]))
    # What the configuration cannot say was put in afterwards.
    swapped: Any = getattr(teacher, "swapped_activation", None)
    return student if swapped is None else swap_activation(student, swapped)


def _hidden_and_heads(config: Any, hidden: int | None, heads: int | None) -> tuple[int, int]:
    size, count = config.hidden_size, config.num_attention_heads
    if hidden is None and heads is None:
        return size, count
    width = size // count
    if getattr(config, "head_dim", width) != width:
        raise ValueError(f"heads of {config.head_dim} in a hidden size of {size}: only layers and ffn can be cut")
    count = count if heads is None else _smaller("heads", heads, count)
    size = count * width if hidden is None else _smaller("hidden", hidden, size)
    if size % count:
        fitting = [n for n in range(1, config.num_attention_heads + 1) if size % n == 0 and size // n <= width]
        raise ValueError(
            f"hidden={size} is not divisible by {count} heads"
            + (f": give heads={fitting[0]}, or " if fitting else ": give ")
            + f"hidden as a multiple of {count}"
        )
    if size // count > width:
        raise ValueError(
            f"hidden={size} with heads={count} makes a head {size // count} wide, since transformers divides the one "
            f"by the other, and the teacher's are {width}: give hidden={count * width} or less, or more heads"
        )
    return size, count


def _smaller(name: str, given: int, own: int) -> int:
    if not 1 <= given <= own:
        raise ValueError(f"{name}={given}: the teacher has {own}, give 1 to {own}")
    return given


def _built(teacher: nn.Module, config: Any) -> nn.Module:
    """An untrained model of the teacher's class, without the parts that the teacher was built without."""
    known = inspect.signature(type(teacher)).parameters
    optional = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}
    names = {name for name, _ in [*teacher.named_modules(), *teacher.named_parameters()]}
    given = {flag: part in names for flag, part in optional.items() if flag in known}
    weight = next(teacher.parameters())
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config, **given).to(weight.device)
    if hasattr(teacher, "generation_config"):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _picks(
    blocks: Any, layout: _Layout, prefix: str, chosen: list[int], before: Sizes, after: Sizes, config: Any
) -> tuple[Picks, Scales]:
    """What to keep of the layers' heads and feed-forward units, and what to scale, by the teacher's names."""
    picks: Picks = {}
    scales: Scales = {}
    for new, old in enumerate(chosen):
        block, place = blocks[old], f"{prefix}.{old}"
        factor, units = 1.0, []
        if before[:2] != after[:2]:
            width, narrow = before[0] // before[1], after[0] // after[1]
            pairs, values = _heads(block, layout, before[1], after[1], narrow)
            units.append((layout.output, False, values))
            if len(layout.inputs) == 1:
                rows = torch.cat([pairs, pairs + before[0], values + 2 * before[0]])
                units.append((layout.inputs[0], True, rows))
            else:
                units += [(part, True, rows) for part, rows in zip(layout.inputs, (pairs, pairs, values))]
            if getattr(config, "scale_attn_weights", True):
                factor = math.sqrt(narrow / width)
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            factor *= (new + 1) / (old + 1)
        if before[2] != after[2]:
            (up, bias), (down, _) = _matrix(block, layout.up), _matrix(block, layout.down)
            kept = _keep(_norm(up, bias) * _norm(down.T), after[2])
            units += [(layout.up, True, kept), (layout.down, False, kept)]
        for part, out, kept in units:
            picks.setdefault(f"{place}.{part}.weight", []).append((_axis(_at(block, part), out), kept))
            if out:
                picks.setdefault(f"{place}.{part}.bias", []).append((0, kept))
        if factor != 1:
            query = layout.inputs[0]
            scales[f"{place}.{query}.weight"] = (_axis(_at(block, query), True), after[0], factor)
            scales[f"{place}.{query}.bias"] = (0, after[0], factor)
    return picks, scales


def _heads(block: nn.Module, layout: _Layout, count: int, heads: int, narrow: int) -> tuple[Tensor, Tensor]:
    """The rows of queries and keys to keep, and those of values."""
    made = [_matrix(block, part) for part in layout.inputs]
    if len(made) == 1:
        [(weight, bias)] = made
        made = list(zip(weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)))
    q, k, v = (_norm(*part) for part in made)
    o = _norm(_matrix(block, layout.output)[0].T)
    width = len(o) // count
    kept = _keep(o.unflatten(0, (count, width)).norm(dim=1), heads)

    def rows(scores: Tensor) -> Tensor:
        return (kept[:, None] * width + _keep(scores.unflatten(0, (count, width))[kept], narrow)).flatten()

    return rows(q * k), rows(v * o)


def _matrix(block: nn.Module, part: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    module: Any = _at(block, part)
    return (module.weight if _axis(module, True) == 0 else module.weight.T), module.bias


def _axis(module: nn.Module | None, out: bool) -> int:
    """The axis of the weight that counts outputs, or inputs; transformers' Conv1D has them the other way round."""
    return int(out == (type(module).__name__ == "Conv1D"))


@torch.no_grad()
def _fill(
    student: nn.Module,
    teacher: nn.Module,
    prefix: str,
    renamed: dict[str, str],
    picks: Picks,
    scales: Scales,
    size: tuple[int, int],
) -> None:
    """Give the student the teacher's tensors, the picked part of them, and the important hidden units of that."""
    source: dict[str, Tensor] = teacher.state_dict(keep_vars=True)
    taken: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = student.state_dict(keep_vars=True)
    origin = {name: _renamed(name, renamed) for name in targets}
    kept = tuple(renamed.values())
    needed = {name for name in source if name.startswith(kept) or not name.startswith(f"{prefix}.")}
    if odd := sorted(needed ^ set(origin.values())):
        raise ValueError(
            f"the teacher is not what its configuration builds, {odd[0]!r} is only in one of them: give a plain "
            f"{type(student).__name__}, without adapters or parts of your own"
        )
    for name, old in origin.items():
        tensor = source[old].detach()
        for axis, units in picks.get(old, []):
            tensor = tensor.index_select(axis, units.to(tensor.device))
        if old in scales:
            axis, length, factor = scales[old]
            tensor = tensor.clone()
            tensor.narrow(axis, 0, length).mul_(factor)
        taken[name] = tensor
    axes = {name: list(_residual(taken[name], target, size)) for name, target in targets.items()}
    if any(axes.values()):
        gains: list[Tensor] = []
        norms: dict[tuple[int, int], Tensor] = {}  # a tied tensor counts once
        for name, target in targets.items():
            for axis in axes[name]:
                if target.dim() > 1 and not name.startswith(f"{prefix}."):
                    norms[id(target), axis] = _norm(taken[name].movedim(axis, 0))
                elif target.dim() == 1 and name.endswith(".weight"):
                    gains.append(taken[name].double().abs())
        units = _keep(torch.stack(gains).sum(0) * torch.stack(list(norms.values())).sum(0), size[1])
        for name, along in axes.items():
            for axis in along:
                taken[name] = taken[name].index_select(axis, units)
    first: dict[int, Tensor] = {}
    for name, target in targets.items():
        if taken[name].shape != target.shape:
            raise ValueError(
                f"{name!r} is {list(taken[name].shape)} of the teacher and {list(target.shape)} of a "
                f"{type(student).__name__} of these sizes: it cannot be cut so"
            )
        if not torch.equal(first.setdefault(id(target), taken[name]), taken[name]):
            raise ValueError(f"{type(student).__name__} ties {name!r} to another weight, and its teacher does not")
        target.data = taken[name].clone(memory_format=torch.contiguous_format)


def _renamed(name: str, renamed: dict[str, str]) -> str:
    return next((old + name.removeprefix(new) for new, old in renamed.items() if name.startswith(new)), name)


def _residual(tensor: Tensor, target: Tensor, size: tuple[int, int]) -> Iterator[int]:
    """The axes along which the teacher's tensor has its hidden size, and the student's the student's."""
    if tensor.dim() == target.dim() and size[0] != size[1]:
        for axis, pair in enumerate(zip(tensor.shape, target.shape)):
            if pair == size:
                yield axis


def _cut_mlp(
    teacher: MLP, layers: Sequence[int] | None, every: int | None, hidden: int | Sequence[int] | None
) -> nn.Module:
    own: list[int] = teacher.init_args["hidden"]
    chosen = _chosen(len(own), layers, every)
    widths = [own[layer] for layer in chosen]
    if hidden is not None:
        given = [hidden] * len(chosen) if isinstance(hidden, int) else list(hidden)
        if len(given) != len(chosen):
            raise ValueError(f"hidden={given}: the student has {len(chosen)} hidden layers, give as many widths")
        widths = [_smaller("hidden", width, most) for width, most in zip(given, widths)]
    stages = _stages(teacher.layers)
    parts = [stages[layer] for layer in [*chosen, -1]]
    ins = [teacher.init_args["in_features"], *(own[layer] for layer in chosen)]
    for (linear, *_), size, name in zip(parts, ins, [*(f"layer {layer}" for layer in chosen), "the output"]):
        if linear.in_features != size:
            raise ValueError(
                f"layers={chosen}: {name} reads {linear.in_features} numbers and would be given {size}: "
                "keep the layer before it, or leave out only layers as wide as what they read"
            )
    weight = parts[0][0].weight
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(**{**teacher.init_args, "hidden": widths}).to(weight.device, weight.dtype)
    read = torch.arange(ins[0], device=weight.device)
    with torch.no_grad():
        for index, (theirs, mine) in enumerate(zip(parts, _stages(student.layers))):
            linear, units = theirs[0], torch.arange(theirs[0].out_features, device=weight.device)
            if index < len(widths):
                units = _keep(_norm(linear.weight, linear.bias) * _norm(parts[index + 1][0].weight.T), widths[index])
            mine[0].weight.copy_(linear.weight[units][:, read])
            mine[0].bias.copy_(linear.bias[units])
            for norm, other in zip(mine[1:], theirs[1:]):
                state = {name: tensor[units] if tensor.dim() else tensor for name, tensor in other.state_dict().items()}
                norm.load_state_dict(state)
            read = units
    return student


def _stages(layers: Iterable[nn.Module]) -> list[list[Any]]:
    """The linear layers, each with the norm behind it."""
    found: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            found.append([layer])
        elif list(layer.state_dict()):
            found[-1].append(layer)
    return found
