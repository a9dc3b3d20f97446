"""cut_student: a student made of its teacher's weights, with fewer or narrower layers or another activation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distill.student.mlp import cut_mlp
from distill.student.transformer import cut_transformer
from distill.teacher import Teacher
from workbench.models import MLP, SentenceEncoder
from workbench.models.activations import swap_activation
from workbench.models.anatomy import anatomy_of
from workbench.models.copying import copied
from workbench.models.wrappers import unwrap
from workbench.records.source import Source


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
        activation: A row of :mod:`workbench.models.activations`, put in place of the teacher's.

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
    teacher = unwrap(teacher)
    if isinstance(teacher, SentenceEncoder):
        inner = cut_student(teacher.encoder, layers, every, hidden, heads, ffn, activation)
        return SentenceEncoder(inner, teacher.pooling, teacher.normalize).train()
    if isinstance(teacher, MLP):
        _refuse(teacher, {"heads": heads, "ffn": ffn}, "hidden, layers, every and activation")
        student = cut_mlp(teacher, layers, every, hidden)
    elif (anatomy := anatomy_of(teacher)) is not None and anatomy.gate is None:
        if isinstance(hidden, Sequence):
            raise ValueError(f"hidden={list(hidden)}: a transformer has one hidden size, give a number")
        student = cut_transformer(teacher, anatomy, layers, every, hidden, heads, ffn)
    else:
        sizes = {"layers": layers, "every": every, "hidden": hidden, "heads": heads, "ffn": ffn}
        _refuse(teacher, sizes, "activation; others of BERT, RoBERTa, DistilBERT, GPT-2, ViT and workbench.models.MLP")
        student = copied(teacher)
    if activation is not None:
        swap_activation(student, activation)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student.train()


def _refuse(teacher: nn.Module, options: dict[str, Any], allowed: str) -> None:
    if refused := [f"{name}={value}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(refused)}: of a {type(teacher).__name__} can be changed {allowed}")
