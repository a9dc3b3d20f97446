from types import SimpleNamespace

import pytest
import torch

from workbench.tasks.outputs import OutputType, of_problem


def test_classes_are_scored_along_their_axis():
    logits = torch.randn(2, 5, 3, 4)
    assert torch.equal(OutputType("classes", 1).scored(logits), logits.permute(0, 2, 3, 1))
    assert OutputType("classes").scored(logits) is logits
    assert OutputType("classes", 3).scored(logits) is logits


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"class_dim is 4 and the outputs are \[2, 5\]"):
        OutputType("classes", 4).scored(torch.randn(2, 5))


@pytest.mark.parametrize(
    ("kind", "dim", "message"), [("numbers", 1, "no classes"), ("words", -1, "choose from classes")]
)
def test_other_outputs_are_refused(kind, dim, message):
    with pytest.raises(ValueError, match=message):
        OutputType(kind, dim)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("single_label_classification", "classes"), ("multi_label_classification", "labels"), ("regression", "numbers")],
)
def test_problem_types_of_transformers(problem, kind):
    assert of_problem(SimpleNamespace(problem_type=problem)) == OutputType(kind)


def test_no_problem_type_says_nothing():
    assert of_problem(SimpleNamespace(problem_type=None)) is None
    assert of_problem(None) is None
