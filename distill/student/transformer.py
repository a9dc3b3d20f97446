"""Cuts transformers: layers, heads, hidden and feed-forward units of BERT, RoBERTa, DistilBERT, GPT-2 and ViT.

A student is built from the teacher's configuration with smaller sizes, and filled from the teacher's state dict in
three steps. The order matters, since each step reads tensors in the widths that the step before left:

1. layers: every tensor of student layer i comes from the teacher's layer ``chosen[i]``, by name;
2. inside each layer, by names of the teacher (``picks``): heads, dimensions of a head, feed-forward units. The weights
   that produce such a unit and those that read it are cut by the same indices;
3. hidden units (:func:`_fill`): one choice for the whole model, because the residual stream adds the outputs of all
   layers unit by unit. Every axis is cut that is as long as the teacher's hidden size and has the student's in the
   student.

Invariants: scores and norms are in float64; of equal scores the lower index wins; kept units stay in order; a query and
its key keep the same dimensions, a value and the output projection too; tied weights stay tied, or the cut is refused.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.student.units import chosen_layers, keep, norms, smaller
from workbench.models.activations import swap_activation
from workbench.models.anatomy import Anatomy, at, base_of

Sizes = tuple[int, int, int]  # hidden, heads, feed-forward
Picks = dict[str, list[tuple[int, Tensor]]]  # name of a tensor -> (axis, indices to keep along it)
Scales = dict[str, tuple[int, int, float]]  # name of a tensor -> (axis, length, factor): scales the first entries


def cut_transformer(
    teacher: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[int] | None,
    every: int | None,
    hidden: int | None,
    heads: int | None,
    ffn: int | None,
) -> nn.Module:
    """A student of the teacher's class, see :func:`distill.cut_student`."""
    base: Any = base_of(teacher)
    config: Any = copy.deepcopy(teacher.config)
    blocks: Any = at(base, anatomy.layers)
    chosen = chosen_layers(len(blocks), layers, every)
    width = _matrix(blocks[0], anatomy.up)[0].shape[0]
    before = (config.hidden_size, config.num_attention_heads, width)
    after = (*_hidden_and_heads(config, hidden, heads), width if ffn is None else smaller("ffn", ffn, width))
    if before != after and getattr(config, "add_cross_attention", False):
        raise ValueError("hidden, heads and ffn cannot be cut with cross-attention to another model: cut layers only")
    config.num_hidden_layers = len(chosen)
    if before != after:
        if getattr(config, "pooler_output_size", None) == config.hidden_size:
            config.pooler_output_size = after[0]
        config.hidden_size, config.num_attention_heads = after[:2]
        setattr(config, anatomy.ffn, after[2])
    student = _built(teacher, config)
    # "encoder.layer" of a plain BertModel, "bert.encoder.layer" of one with a head.
    prefix = next(name for name, module in teacher.named_modules() if module is blocks)
    picks, scales = _picks(blocks, anatomy, prefix, chosen, before, after, teacher.config)
    renamed = {f"{prefix}.{new}.": f"{prefix}.{old}." for new, old in enumerate(chosen)}
    _fill(student, teacher, prefix, renamed, picks, scales, (before[0], after[0]))
    # An activation that no configuration can name was swapped in after the teacher was built: do the same here.
    swapped: Any = getattr(teacher, "swapped_activation", None)
    return student if swapped is None else swap_activation(student, swapped)


def _hidden_and_heads(config: Any, hidden: int | None, heads: int | None) -> tuple[int, int]:
    size, count = config.hidden_size, config.num_attention_heads
    if hidden is None and heads is None:
        return size, count
    width = size // count
    if getattr(config, "head_dim", width) != width:
        raise ValueError(f"heads of {config.head_dim} in a hidden size of {size}: only layers and ffn can be cut")
    count = count if heads is None else smaller("heads", heads, count)
    size = count * width if hidden is None else smaller("hidden", hidden, size)
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


def _built(teacher: nn.Module, config: Any) -> nn.Module:
    """An untrained model of the teacher's class, without the parts that the teacher was built without."""
    accepted = inspect.signature(type(teacher)).parameters
    optional = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}
    names = {name for name, _ in [*teacher.named_modules(), *teacher.named_parameters()]}
    flags = {flag: part in names for flag, part in optional.items() if flag in accepted}
    weight = next(teacher.parameters())
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config, **flags).to(weight.device)
    if hasattr(teacher, "generation_config"):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _picks(
    blocks: Any, anatomy: Anatomy, prefix: str, chosen: list[int], before: Sizes, after: Sizes, config: Any
) -> tuple[Picks, Scales]:
    """What to keep of the layers' heads and feed-forward units, and what to scale, by the teacher's names."""
    picks: Picks = {}
    scales: Scales = {}
    for new, old in enumerate(chosen):
        block, path = blocks[old], f"{prefix}.{old}"
        factor, units = 1.0, []
        if before[:2] != after[:2]:
            width, narrow = before[0] // before[1], after[0] // after[1]
            pairs, values = _heads(block, anatomy, before[1], after[1], narrow)
            units.append((anatomy.output, False, values))
            if len(anatomy.inputs) == 1:
                # GPT-2 has one matrix for queries, keys and values, one after the other.
                rows = torch.cat([pairs, pairs + before[0], values + 2 * before[0]])
                units.append((anatomy.inputs[0], True, rows))
            else:
                units += [(part, True, rows) for part, rows in zip(anatomy.inputs, (pairs, pairs, values))]
            if getattr(config, "scale_attn_weights", True):
                # The student divides scores by sqrt(narrow), the teacher by sqrt(width): its queries make up for it.
                factor = math.sqrt(narrow / width)
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            # Scores are divided by the number of the layer, which is another in the student.
            factor *= (new + 1) / (old + 1)
        if before[2] != after[2]:
            (up, bias), (down, _) = _matrix(block, anatomy.up), _matrix(block, anatomy.down)
            kept = keep(norms(up, bias) * norms(down.T), after[2])
            units += [(anatomy.up, True, kept), (anatomy.down, False, kept)]
        for part, out, kept in units:
            picks.setdefault(f"{path}.{part}.weight", []).append((_axis(at(block, part), out), kept))
            if out:
                picks.setdefault(f"{path}.{part}.bias", []).append((0, kept))
        if factor != 1:
            query = anatomy.inputs[0]
            scales[f"{path}.{query}.weight"] = (_axis(at(block, query), True), after[0], factor)
            scales[f"{path}.{query}.bias"] = (0, after[0], factor)
    return picks, scales


def _heads(block: nn.Module, anatomy: Anatomy, count: int, heads: int, narrow: int) -> tuple[Tensor, Tensor]:
    """The rows of queries and keys to keep, and those of values."""
    matrices = [_matrix(block, part) for part in anatomy.inputs]
    if len(matrices) == 1:
        [(weight, bias)] = matrices
        matrices = list(zip(weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)))
    q, k, v = (norms(*part) for part in matrices)
    o = norms(_matrix(block, anatomy.output)[0].T)
    width = len(o) // count
    kept = keep(o.unflatten(0, (count, width)).norm(dim=1), heads)

    def rows(scores: Tensor) -> Tensor:
        return (kept[:, None] * width + keep(scores.unflatten(0, (count, width))[kept], narrow)).flatten()

    return rows(q * k), rows(v * o)


def _matrix(block: nn.Module, part: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    module: Any = at(block, part)
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
    """Fill the student with the picked part of each of the teacher's tensors, then cut the hidden units."""
    source: dict[str, Tensor] = teacher.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = student.state_dict(keep_vars=True)
    origin = {name: _renamed(name, renamed) for name in targets}
    kept = tuple(renamed.values())
    needed = {name for name in source if name.startswith(kept) or not name.startswith(f"{prefix}.")}
    if unmatched := sorted(needed ^ set(origin.values())):
        raise ValueError(
            f"the teacher is not what its configuration builds, {unmatched[0]!r} is only in one of them: give a plain "
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
        tensors[name] = tensor
    axes = {name: list(_residual(tensors[name], target, size)) for name, target in targets.items()}
    if any(axes.values()):
        # Importance of a hidden unit: the gains of all norms times the norms of the embeddings and heads around the
        # layers, see cut_student.
        gains: list[Tensor] = []
        sums: dict[tuple[int, int], Tensor] = {}  # a tied tensor counts once
        for name, target in targets.items():
            for axis in axes[name]:
                if target.dim() > 1 and not name.startswith(f"{prefix}."):
                    sums[id(target), axis] = norms(tensors[name].movedim(axis, 0))
                elif target.dim() == 1 and name.endswith(".weight"):
                    gains.append(tensors[name].double().abs())
        units = keep(torch.stack(gains).sum(0) * torch.stack(list(sums.values())).sum(0), size[1])
        for name, along in axes.items():
            for axis in along:
                tensors[name] = tensors[name].index_select(axis, units)
    # Tied weights are one tensor under several names: all of them must have been cut alike.
    first: dict[int, Tensor] = {}
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"{name!r} is {list(tensors[name].shape)} of the teacher and {list(target.shape)} of a "
                f"{type(student).__name__} of these sizes: it cannot be cut so"
            )
        if not torch.equal(first.setdefault(id(target), tensors[name]), tensors[name]):
            raise ValueError(f"{type(student).__name__} ties {name!r} to another weight, and its teacher does not")
        target.data = tensors[name].clone(memory_format=torch.contiguous_format)


def _renamed(name: str, renamed: dict[str, str]) -> str:
    return next((old + name.removeprefix(new) for new, old in renamed.items() if name.startswith(new)), name)


def _residual(tensor: Tensor, target: Tensor, size: tuple[int, int]) -> Iterator[int]:
    """The axes along which the teacher's tensor has its hidden size, and the student's the student's."""
    if tensor.dim() == target.dim() and size[0] != size[1]:
        for axis, pair in enumerate(zip(tensor.shape, target.shape)):
            if pair == size:
                yield axis
