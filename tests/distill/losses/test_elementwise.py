"""Losses on labels and numbers, each beside the same in loops."""

import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import losses
from distill.losses import LogitLoss

INF, NAN = float("inf"), float("nan")
SHAPES = [(), (5,), (4, 3), (2, 3, 4, 5)]


def bernoulli_oracle(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None) -> float:
    """T^2 times the mean of KL(Bernoulli || Bernoulli)."""
    found = []
    for zs, zt in pairs(student, teacher, valid=valid):
        q, p = 1 / (1 + math.exp(-zs / temperature)), 1 / (1 + math.exp(-zt / temperature))
        found.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return temperature**2 * sum(found) / max(len(found), 1)


def bounded_oracle(student: Tensor, teacher: Tensor, labels: Tensor, margin: float, valid: Tensor | None) -> float:
    """Chen et al. 2017, section 3.3."""
    found = [
        (s - y) ** 2 * ((s - y) ** 2 + margin > (t - y) ** 2)
        for s, t, y in pairs(student, teacher, labels, valid=valid)
    ]
    return sum(found) / max(len(found), 1)


def attentive_oracle(student: Tensor, teacher: Tensor, labels: Tensor, spread: float, valid: Tensor | None) -> float:
    """Saputra et al. 2019, section 4."""
    found = [
        max(0, 1 - (t - y) ** 2 / spread) * (s - t) ** 2 for s, t, y in pairs(student, teacher, labels, valid=valid)
    ]
    return sum(found) / max(len(found), 1)


def pairs(*tensors: Tensor, valid: Tensor | None) -> list[tuple[float, ...]]:
    kept = torch.ones_like(tensors[0], dtype=torch.bool) if valid is None else valid
    return [
        row for row, counts in zip(zip(*(t.flatten().tolist() for t in tensors)), kept.flatten().tolist()) if counts
    ]


def some(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, labels = (2 * torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return student, teacher, labels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_in_loops(shape: tuple[int, ...], masked: bool) -> None:
    s, t, y = some(*shape)
    valid = torch.rand(shape) < 0.6 if masked else None
    for temperature in (1.0, 4.0):
        expected = bernoulli_oracle(s, t, temperature, valid)
        assert losses.bernoulli_target(s, t, temperature, valid).item() == pytest.approx(expected)
    assert losses.squared_error(s, t, valid, scale=3.0).item() == pytest.approx(losses.squared_error(s, t, valid) / 9)
    for margin in (0.0, 2.0):
        expected = bounded_oracle(s, t, y, margin, valid)
        assert losses.teacher_bounded(s, t, valid, labels=y, margin=margin).item() == pytest.approx(expected)
    for spread in (0.5, 20.0):
        expected = attentive_oracle(s, t, y, spread, valid)
        assert losses.attentive_imitation(s, t, valid, labels=y, spread=spread).item() == pytest.approx(expected)


def test_a_binary_classifier_of_one_logit_is_two_classes() -> None:
    """A logit z is the two classes (z, 0)."""
    s, t, _ = some(7)
    s.requires_grad_()
    one = losses.bernoulli_target(s, t, 3.0)
    two = losses.soft_target(*(torch.stack([z, torch.zeros_like(z)], -1) for z in (s, t)), 3.0)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in (one, two)))


def test_a_shift_of_every_label_is_seen() -> None:
    """Softmax across independent labels does not see it."""
    s, t = torch.full((2, 6), -5.0), torch.full((2, 6), 5.0)
    assert losses.soft_target(s, t).item() == 0
    assert losses.bernoulli_target(s, t).item() == pytest.approx(bernoulli_oracle(s, t, 4.0, None), rel=1e-5)


def test_the_gradients_scale_is_about_constant_in_the_temperature() -> None:
    s, t, _ = some(50)
    s.requires_grad_()
    sizes = [torch.autograd.grad(losses.bernoulli_target(s, t, T), s)[0].norm() for T in (8.0, 64.0)]
    assert 0.7 < sizes[1] / sizes[0] < 1.5


@pytest.mark.parametrize("big", [300.0, 1e30, INF])
def test_certain_teachers_and_students_stay_finite(big: float) -> None:
    s = torch.tensor([3.0, -3.0, big, -big], requires_grad=True)
    t = torch.tensor([big, -big, big, -big])
    value = losses.bernoulli_target(s, t, 1.0)
    (grad,) = torch.autograd.grad(value, s)
    assert value.item() == pytest.approx(2 * math.log1p(math.exp(-3.0)) / 4)
    assert grad.isfinite().all()
    assert losses.bernoulli_target(-t, t, 1.0) > 100


CALLS: dict[str, Any] = {
    "bernoulli": lambda s, t, v, y: losses.bernoulli_target(s, t, 2.0, v),
    "squared": lambda s, t, v, y: losses.squared_error(s, t, v, scale=[1.0, 2.0, 0.5]),
    "bounded": lambda s, t, v, y: losses.teacher_bounded(s, t, v, labels=y, margin=0.5),
    "attentive": lambda s, t, v, y: losses.attentive_imitation(s, t, v, labels=y, spread=3.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_values_that_do_not_count_change_nothing(call: Any) -> None:
    s, t, y = some(4, 3)
    valid = torch.rand(4, 3) < 0.6
    s.requires_grad_()
    found = call(s, t, valid, y)
    junk_s, junk_t, junk_y = (torch.where(valid, z.detach(), NAN) for z in (s, t, y))
    junk = call(junk_s.requires_grad_(), junk_t, valid, junk_y)
    assert torch.equal(found, junk)
    assert torch.equal(torch.autograd.grad(found, s)[0], torch.autograd.grad(junk, junk_s)[0])
    nothing = call(s, t, torch.zeros(4, 3, dtype=torch.bool), y)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, s)[0].any()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_pieces_weighed_by_what_counts_are_the_whole(call: Any) -> None:
    s, t, y = some(6, 3)
    valid = torch.rand(6, 3) < 0.6
    parts = sum(
        call(s[i : i + 2], t[i : i + 2], valid[i : i + 2], y[i : i + 2]) * valid[i : i + 2].sum() for i in (0, 2, 4)
    )
    torch.testing.assert_close(parts / valid.sum(), call(s, t, valid, y))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_half_precision_is_computed_in_full_and_the_teacher_gets_no_gradient(call: Any) -> None:
    s, t, y = (each.bfloat16() for each in some(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = call(s, t.requires_grad_(), None, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, call(s.float(), t.float(), None, y.float()))
    assert not found.requires_grad


def test_a_scale_makes_units_count_alike() -> None:
    s, t, _ = some(50, 2)
    unit = torch.tensor([1.0, 1000.0])
    scaled = losses.squared_error(s * unit, t * unit, scale=unit.tolist())
    torch.testing.assert_close(scaled, losses.squared_error(s, t))


MODULES: dict[type[LogitLoss], Any] = {
    losses.BernoulliTarget: lambda: losses.BernoulliTarget(2.0),
    losses.SquaredError: lambda: losses.SquaredError([1.0, 2.0, 0.5]),
    losses.TeacherBounded: lambda: losses.TeacherBounded(0.5),
    losses.AttentiveImitation: lambda: losses.AttentiveImitation(3.0),
}


@pytest.mark.parametrize(("module", "call"), list(zip(MODULES.values(), CALLS.values())), ids=CALLS)
def test_a_module_is_its_function(module: Any, call: Any) -> None:
    s, t, y = some(4, 3)
    valid = torch.rand(4, 3) < 0.6
    made = pickle.loads(pickle.dumps(module()))
    assert torch.equal(made(s, t, valid, y), call(s, t, valid, y))
    assert repr(made) == repr(module())
    assert all(f"{name}=" in repr(made) for name in inspect.signature(type(made)).parameters)
    if made.needs_labels:
        with pytest.raises(ValueError, match="needs labels and got None"):
            made(s, t, valid)


def test_embeddings_are_compared_by_their_direction() -> None:
    s, t, _ = some(4, 3)
    valid = torch.tensor([True, False, True, True])
    assert torch.equal(losses.EmbeddingCosine()(s, t, valid), losses.cosine(s, t, valid))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: losses.bernoulli_target(s, s[:2]), r"outputs are \[4, 3\] and the teacher's \[2, 3\]"),
        (lambda s: losses.bernoulli_target(s, s, 0.0), "temperature is 0"),
        (lambda s: losses.bernoulli_target(s, s, 1.0, torch.ones(4, dtype=torch.bool)), r"bool \[4, 3\] is needed"),
        (lambda s: losses.squared_error(s, s, scale=0.0), "scale is 0.0: give positive"),
        (lambda s: losses.squared_error(s, s, scale=[1.0]), r"scale has 1 numbers and outputs are \[4, 3\]"),
        (lambda s: losses.teacher_bounded(s, s, labels=s, margin=-1), "margin is -1"),
        (lambda s: losses.teacher_bounded(s, s, labels=s[0]), r"labels are \[3\]: numbers \[4, 3\] are needed"),
        (lambda s: losses.attentive_imitation(s, s, labels=s, spread=0.0), "spread is 0.0"),
        (lambda s: losses.BernoulliTarget(-1), "temperature is -1"),
        (lambda s: losses.SquaredError([]), r"scale is \[\]"),
        (lambda s: losses.TeacherBounded(INF), "margin is inf"),
        (lambda s: losses.AttentiveImitation(NAN), "spread is nan"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(torch.randn(4, 3))
