"""Students of any network, and teachers from disk."""

from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch import nn

import workbench.launcher.arguments  # noqa: F401 - makes Source known to parsers
from distill import Teacher
from distill.student import cut_student
from workbench.checkpoints import compact
from workbench.models import MLP, LeNet5


def test_any_network_can_get_another_activation() -> None:
    teacher = LeNet5().eval().requires_grad_(False)
    student: Any = cut_student(teacher, activation="relu")
    assert student.init_args["activation"] == "relu"
    assert teacher.init_args["activation"] == "gelu"
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(student.head[0].weight, teacher.head[0].weight)


def test_a_teacher_from_disk_or_in_a_recipe(tmp_path: Path) -> None:
    teacher = MLP(4, [7, 5], 3)
    compact.save(teacher, tmp_path)
    for source in (str(tmp_path), tmp_path, Teacher(teacher)):
        student: Any = cut_student(source, hidden=[4, 3])  # type: ignore[arg-type]
        assert student.init_args["hidden"] == [4, 3]
        assert student.layers[0].weight.requires_grad
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    given = {"class_path": "distill.cut_student", "init_args": {"teacher": str(tmp_path), "hidden": [4, 3]}}
    made = parser.instantiate(parser.parse_object({"model": given})).model
    assert torch.equal(made.layers[0].weight, student.layers[0].weight)
