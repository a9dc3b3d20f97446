import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from workbench.tasks.outputs import OutputType, infer, of_problem, output_type


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


BERT = SimpleNamespace(model_type="bert", problem_type=None)
CLASSES, LABELS, NUMBERS = OutputType("classes"), OutputType("labels"), OutputType("numbers")


def ints(*shape: int, top: int = 5) -> torch.Tensor:
    values = torch.randint(top, shape)
    values.view(-1)[:2] = torch.tensor([top - 1, 0])[: values.numel()]
    return values


BITS = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]])
ODD = torch.tensor([[True, False, False]] * 4)


def floats(*shape: int) -> torch.Tensor:
    return torch.linspace(-2, 3, torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize(
    ("logits", "labels", "config", "expected"),
    [
        ([4, 5], ints(4), None, CLASSES),
        ([5, 5], ints(5), None, CLASSES),
        ([4, 5], ints(4).masked_fill(torch.arange(4) == 1, -100), None, CLASSES),
        ([4, 3, 5], ints(4, 3), None, CLASSES),
        ([4, 5, 3], ints(4, 3), None, OutputType("classes", 1)),
        ([4, 5, 6, 7], ints(4, 6, 7), None, OutputType("classes", 1)),
        ([4, 6, 7, 5], ints(4, 6, 7), None, CLASSES),
        ([2, 5, 4, 6], ints(2, 16, 24), None, OutputType("classes", 1)),
        ([2, 5, 4, 6], ints(2, 15, 23), BERT, OutputType("classes", 1)),
        ([4, 5, 5], ints(4, 5), BERT, CLASSES),
        ([4, 3], BITS, None, LABELS),
        ([4, 3], BITS.bool(), None, LABELS),
        ([4, 3], BITS.flatten(), None, LABELS),
        ([4, 3], BITS.float().masked_fill(ODD, -100), None, LABELS),
        ([4, 5], ints(4, 1), None, CLASSES),
        ([4, 1, 5], ints(4), None, CLASSES),
        ([6, 5], ints(2, 3), None, CLASSES),
        ([2, 3, 5], ints(6), None, CLASSES),
        ([2, 12, 5], ints(2, 3, 4), None, CLASSES),
        ([4, 5, 6, 7], ints(4, 1, 6, 7), None, OutputType("classes", 1)),
        ([4, 3], torch.tensor([[0, 1, -100]] * 4), None, LABELS),
        ([4], ints(4, top=2), None, LABELS),
        ([4, 1], ints(4, top=2), None, LABELS),
        ([4, 1], ints(4, 1, top=2).bool(), None, LABELS),
        ([4, 1, 6, 6], ints(4, 6, 6, top=2), None, LABELS),
        ([4, 1], ints(4, top=2), BERT, LABELS),
        ([2, 3], torch.tensor([[1.0, 1, 0], [0, 1, 0]]), None, LABELS),
        ([4, 3], floats(4, 3), None, NUMBERS),
        ([4, 1], floats(4), None, NUMBERS),
        ([4, 5], None, BERT, CLASSES),
        ([4, 3, 5], None, BERT, CLASSES),
        ([4, 5], ints(4), SimpleNamespace(model_type="bert", problem_type="regression"), NUMBERS),
        ([4, 3], torch.eye(3)[[0, 1, 2, 0]], SimpleNamespace(problem_type="multi_label_classification"), LABELS),
    ],
)
def test_a_first_batch_tells_what_outputs_are(logits, labels, config, expected):
    assert infer(torch.randn(logits), labels, config) == expected


@pytest.mark.parametrize(
    ("logits", "labels", "config", "why"),
    [
        ([4, 5, 5], ints(4, 5), None, "classes may stand along several axes"),
        ([4, 3], torch.eye(3)[[0, 1, 2, 0]], None, "one class each or independent labels"),
        ([4, 3], torch.eye(3).long()[[0, 1, 2, 0]], None, "one class each or independent labels"),
        ([4, 3], torch.eye(3).bool()[[0, 1, 2, 0]], None, "one class each or independent labels"),
        ([4, 3], BITS.float().masked_fill(ODD, -1), None, r"-1 does not count \(ignore_index=-1\)"),
        ([4, 3, 2], ints(4, 2, 3), None, "do not go together"),
        ([4, 3], torch.full((4, 3), 1 / 3), None, "labels, probabilities or numbers"),
        ([4, 1], torch.tensor([0.0, 1, 1, 0]), None, "labels, probabilities or numbers"),
        ([4, 1], torch.tensor([0.0, 1, 1, 0]), BERT, "labels, probabilities or numbers"),
        ([4], torch.tensor([0.0, 1, 1, 0]), None, "labels, probabilities or numbers"),
        ([4, 3], ints(4, 3), None, "labels only if each is 0 or 1"),
        ([4, 1], ints(4), None, "labels only if each is 0 or 1"),
        ([4, 5], ints(4, 2), None, "do not go together"),
        ([4, 5], floats(4), None, "do not go together"),
        ([2, 6, 4, 5], ints(2, 12, 32), None, "do not go together"),
        ([4, 5, 3], None, None, "without labels it cannot be told what they are"),
        ([4], None, None, "without labels it cannot be told what they are"),
        ([4, 1], None, BERT, "without labels it cannot be told what they are"),
    ],
)
def test_what_it_does_not_tell_is_asked(logits, labels, config, why):
    with pytest.raises(ValueError, match=rf"{why}\. Say it by the argument outputs: 'classes'"):
        infer(torch.randn(logits), labels, config)


def test_missing_float_labels_are_named_by_their_index():
    labels = BITS.float().masked_fill(ODD, -1)
    assert infer(torch.randn(4, 3), labels, ignore_index=-1) == LABELS
    assert torch.equal(LABELS.positions(torch.randn(4, 3), labels, -1)[0], ~ODD)
    assert infer(torch.randn(4, 3), floats(4, 3), ignore_index=None) == NUMBERS


def test_a_plain_network_without_labels_is_taken_for_a_classifier_and_told():
    with pytest.warns(UserWarning, match=r"outputs \[4, 5\] come without labels and are taken for logits of classes"):
        assert infer(torch.randn(4, 5)) == CLASSES


def test_bytes_are_not_taken_for_what_does_not_count():
    labels = torch.tensor([156, 3], dtype=torch.uint8)
    valid, found = CLASSES.positions(torch.randn(2, 200), labels)
    assert valid.all()
    assert found.tolist() == [156, 3]
    with pytest.raises(ValueError, match="labels only if each is 0 or 1"):
        infer(torch.randn(2), labels)


def test_labels_of_flattened_outputs_stand_in_their_order():
    labels = ints(2, 3)
    assert torch.equal(CLASSES.positions(torch.randn(6, 5), labels)[1], labels.flatten())
    with pytest.raises(ValueError, match=r"takes them by labels=lambda batch"):
        CLASSES.positions(torch.randn(6, 4, 5), ints(4, 6))


def test_labels_of_a_larger_image_are_taken_at_the_nearest_pixel():
    labels = ints(2, 8, 13)
    labels[0, :3] = -100
    valid, found = CLASSES.positions(torch.randn(2, 4, 5, 6), labels)
    expected = nn.functional.interpolate(labels[:, None].double(), (4, 5), mode="nearest-exact")[:, 0].long()
    assert torch.equal(found, expected)
    assert torch.equal(valid, expected != -100)
    multi = ints(2, 3, 8, 8, top=2)
    _, found = LABELS.positions(torch.randn(2, 3, 4, 4), multi)
    assert torch.equal(found, multi[:, :, 1::2, 1::2])


def test_positions_that_count():
    valid, labels = CLASSES.positions(torch.randn(2, 3, 5), torch.tensor([0, 1, -100, 2, 3, 255]), 255)
    assert labels.tolist() == [[0, 1, -100], [2, 3, 255]]
    assert valid.tolist() == [[True, True, True], [True, True, False]]
    valid, labels = LABELS.positions(torch.randn(3, 1), torch.tensor([0, -100, 1]))
    assert valid.tolist() == [[True], [False], [True]]
    valid, _ = NUMBERS.positions(torch.randn(3), torch.tensor([[0.0], [-100.0], [math.nan]]))
    assert valid.tolist() == [True, True, False]
    assert LABELS.positions(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))[0].all()
    for outputs, shape in ((CLASSES, [2, 3]), (LABELS, [2, 3, 5]), (OutputType("embedding"), [2, 3])):
        valid, labels = outputs.positions(torch.randn(2, 3, 5))
        assert valid.all()
        assert list(valid.shape) == shape
        assert labels is None
    assert CLASSES.positions(torch.randn(2, 3), torch.rand(2, 3))[1] is None
    with pytest.raises(ValueError, match=r"labels are torch.int64 \[3\] and the outputs, which are classes, \[2, 5\]"):
        CLASSES.positions(torch.randn(2, 5), ints(3))


def test_an_argument_may_be_the_kind_alone():
    assert output_type("labels") == LABELS
    assert output_type(LABELS) is LABELS
