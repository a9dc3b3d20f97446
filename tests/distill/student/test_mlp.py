"""Multilayer perceptrons cut from a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench.launcher.arguments  # noqa: F401 - makes Source known to parsers
from distill.student import cut_student
from workbench.checkpoints import compact
from workbench.models import MLP


def mlp(hidden: tuple[int, ...] = (7, 5), **kwargs: Any) -> MLP:
    torch.manual_seed(0)
    model = MLP(4, hidden, 3, **kwargs).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return model.eval()


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_an_mlp_whole_and_narrowed(norm: Any, tmp_path: Path) -> None:
    teacher, x = mlp(norm=norm), torch.randn(6, 4).double()
    assert torch.equal(cut_student(teacher).eval()(x), teacher(x))
    first, last = (layer for layer in teacher.layers if isinstance(layer, nn.Linear) and layer.in_features != 7)
    middle: Any = next(layer for layer in teacher.layers if isinstance(layer, nn.Linear) and layer.in_features == 7)
    scores = [
        (torch.cat([a.weight, a.bias[:, None]], 1).norm(dim=1) * b.weight.norm(dim=0)).tolist()
        for a, b in ((first, middle), (middle, last))
    ]
    kept = [sorted(sorted(range(len(score)), key=lambda i: -score[i])[:count]) for score, count in zip(scores, (4, 3))]
    student: Any = cut_student(teacher, hidden=[4, 3], activation="relu")
    assert student.init_args == {**teacher.init_args, "hidden": [4, 3], "activation": "relu"}
    layers = [layer for layer in student.layers if isinstance(layer, nn.Linear)]
    assert torch.equal(layers[0].weight, first.weight[kept[0]])
    assert torch.equal(layers[1].weight, middle.weight[kept[1]][:, kept[0]])
    assert torch.equal(layers[1].bias, middle.bias[kept[1]])
    assert torch.equal(layers[2].weight, last.weight[:, kept[1]])
    if norm != "none":
        assert torch.equal(student.layers[1].weight, teacher.layers[1].weight[kept[0]])  # type: ignore[index]
    if norm == "batch":
        assert torch.equal(student.layers[4].running_var, teacher.layers[4].running_var[kept[1]])  # type: ignore[index]
    compact.save(student, tmp_path)
    assert torch.equal(compact.load(tmp_path).double()(x), student.eval()(x))


def test_dead_units_of_an_mlp_go_first() -> None:
    teacher, x = mlp((6, 6)), torch.randn(5, 4).double()
    with torch.no_grad():
        teacher.layers[2].weight[:, [1, 4]] = 0
        teacher.layers[4].weight[:, [0]] = 0
    assert torch.allclose(cut_student(teacher, hidden=[4, 5])(x), teacher(x), atol=1e-12)
    assert not torch.allclose(cut_student(teacher, hidden=4)(x), teacher(x), atol=1e-12)


def test_layers_of_an_mlp() -> None:
    teacher = mlp((5, 5, 5, 5))
    student: Any = cut_student(teacher, layers=[0, 2])
    assert torch.equal(student.layers[2].weight, teacher.layers[4].weight)
    assert student.init_args["hidden"] == [5, 5]
    assert cut_student(teacher, every=2, hidden=3).init_args["hidden"] == [3, 3]
    with pytest.raises(ValueError, match=r"layers=\[1, 2\]: layer 1 reads 5 numbers and would be given 4"):
        cut_student(teacher, layers=[1, 2])
    with pytest.raises(ValueError, match="the output reads 5 numbers and would be given 7"):
        cut_student(mlp((7, 5)), layers=[0])
    with pytest.raises(ValueError, match="the student has 4 hidden layers, give as many widths"):
        cut_student(teacher, hidden=[3, 3])
    with pytest.raises(ValueError, match="hidden=6: the teacher has 5"):
        cut_student(teacher, hidden=6)
