import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses import label_smoothing, shuffled_off_class, soft_target

INF = float("inf")


def dealt(teacher: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """The probabilities that the student is shown, read off the gradient q - p at T = 1."""
    student = torch.zeros_like(teacher, requires_grad=True)
    shown = shuffled_off_class(student, teacher, 1.0, labels=labels, generator=torch.Generator().manual_seed(seed))
    (grad,) = torch.autograd.grad(shown * len(teacher), student)
    return student.softmax(-1).detach() - grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch(smoothing: float) -> None:
    student, labels = torch.randn(4, 3, 7), torch.randint(7, (4, 3))
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    assert torch.allclose(label_smoothing(student, labels, smoothing), expected)


def test_label_smoothing_spreads_over_the_classes_there_are() -> None:
    student, labels = torch.randn(4, 5), torch.randint(5, (4,))
    padded = torch.cat([student, torch.full((4, 2), -INF)], -1)
    assert torch.allclose(label_smoothing(padded, labels), label_smoothing(student, labels))


def test_shuffling_keeps_the_label_and_the_rest_as_a_set() -> None:
    teacher, labels = 3 * torch.randn(50, 6, dtype=torch.float64), torch.randint(6, (50,))
    p, shown = teacher.softmax(-1), dealt(teacher, labels)
    row = torch.arange(50)
    assert torch.allclose(shown[row, labels], p[row, labels])
    assert torch.allclose(shown.sort(-1).values, p.sort(-1).values)
    assert not torch.allclose(shown, p)


def test_shuffling_puts_every_class_everywhere_equally_often() -> None:
    """Of 6000 deals of 3 classes to 3 places each of the 6 orders comes about 1000 times: within 5 deviations."""
    teacher = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).expand(6000, 4)
    shown = dealt(teacher, torch.full((6000,), 1))
    orders, counts = shown.mul(1e6).round().unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert (counts - 1000).abs().max() < 5 * (6000 * 1 / 6 * 5 / 6) ** 0.5


def test_shuffling_is_its_generators() -> None:
    teacher, labels = torch.randn(20, 6, dtype=torch.float64), torch.randint(6, (20,))
    assert torch.equal(dealt(teacher, labels, 1), dealt(teacher, labels, 1))
    assert not torch.equal(dealt(teacher, labels, 1), dealt(teacher, labels, 2))
    state = torch.get_rng_state()
    dealt(teacher, labels)
    assert torch.equal(torch.get_rng_state(), state), "with one of its own, torch's is left alone"


def test_shuffling_leaves_ruled_out_classes_where_they_are() -> None:
    teacher, labels = torch.randn(30, 6, dtype=torch.float64), torch.zeros(30, dtype=torch.int64)
    teacher[:, 2] = teacher[:, 5] = -INF
    shown = dealt(teacher, labels)
    assert shown[:, [2, 5]].abs().max() < 1e-15
    assert (shown[:, [0, 1, 3, 4]] > 0).all()


def test_shuffling_two_classes_changes_nothing() -> None:
    student, teacher, labels = torch.randn(9, 2), torch.randn(9, 2), torch.randint(2, (9,))
    assert torch.equal(shuffled_off_class(student, teacher, labels=labels), soft_target(student, teacher))
