import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill.losses import mix, soft_target
from tests.helpers.oracles import soft_target as oracle

INF = float("inf")


def logits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (3, 4, 7), (2, 3, 2, 5), (6,)])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20])
def test_equals_the_formula_in_loops(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = logits(*shape), logits(*shape)
    rows = (student[None], teacher[None]) if len(shape) == 1 else (student, teacher)
    assert soft_target(student, teacher, temperature).item() == pytest.approx(oracle(*rows, temperature), rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 7)])
def test_only_valid_positions_count(shape: tuple[int, ...]) -> None:
    student, teacher = logits(*shape), logits(*shape)
    valid = torch.rand(shape[:-1]) < 0.6
    assert 0 < valid.sum() < valid.numel()
    found = soft_target(student, teacher, 3.0, valid)
    assert found.item() == pytest.approx(oracle(student, teacher, 3.0, valid), rel=1e-12)
    assert found.item() == pytest.approx(soft_target(student[valid], teacher[valid], 3.0).item(), rel=1e-12)


def test_equals_kl_div_by_the_batch_times_the_square() -> None:
    """`reduction="mean"` divides by the classes as well."""
    student, teacher = logits(8, 100), logits(8, 100)
    log_q, p = F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1)
    assert torch.allclose(soft_target(student, teacher, 4.0), 16 * F.kl_div(log_q, p, reduction="batchmean"))


@given(st.integers(0, 2**31), st.floats(0.1, 20), st.floats(-50, 50))
def test_is_a_divergence(seed: int, temperature: float, shift: float) -> None:
    torch.manual_seed(seed)
    student, teacher = logits(4, 6), logits(4, 6)
    value = soft_target(student, teacher, temperature)
    assert value >= -1e-9
    assert soft_target(teacher, teacher, temperature).abs() <= 1e-9
    assert torch.allclose(soft_target(student + shift, teacher - shift, temperature), value, atol=1e-9)


def test_gradient_is_the_closed_form() -> None:
    """T (q - p) / B; Hinton et al. 2015, equation 2, times T^2."""
    student, teacher = logits(5, 7).requires_grad_(), logits(5, 7)
    soft_target(student, teacher, 3.0).backward()
    q, p = (student.detach() / 3).softmax(-1), (teacher / 3).softmax(-1)
    assert student.grad is not None
    assert torch.allclose(student.grad, 3.0 * (q - p) / 5)
    assert torch.autograd.gradcheck(lambda z: soft_target(z, teacher, 3.0), student)


def test_gradient_has_about_the_same_scale_at_every_temperature() -> None:
    """Pitfall 4. Without the factor T^2 it would fall 64-fold from T = 1 to 8."""
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        torch.manual_seed(0)
        student = logits(64, 10, scale=1.0).requires_grad_()
        soft_target(student, logits(64, 10, scale=1.0), temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_full_precision(dtype: torch.dtype) -> None:
    student, teacher = logits(16, 1000, dtype=dtype), logits(16, 1000, dtype=dtype)
    found = soft_target(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle(student.double(), teacher.double(), 4.0), rel=1e-5)
    found.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


def test_autocast_does_not_reach_inside() -> None:
    student, teacher = logits(16, 1000, dtype=torch.float32), logits(16, 1000, dtype=torch.float32)
    expected = soft_target(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_target(student, teacher), expected)


def test_large_half_precision_logits_do_not_overflow() -> None:
    student = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[-60000.0, 60000.0]], dtype=torch.float16)
    value = soft_target(student, teacher, 100.0)
    value.backward()
    assert value.item() == pytest.approx(100**2 * 2 * 60000 / 100)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("student_too", [False, True])
def test_padded_classes_take_no_probability(student_too: bool) -> None:
    """Pitfall 9: -inf, not 0, and no NaN of 0 * inf in value or gradient."""
    student, teacher = logits(4, 6), logits(4, 6)
    teacher[:, 4:] = -INF
    if student_too:
        student[:, 4:] = -INF
    student.requires_grad_()
    value = soft_target(student, teacher, 2.0)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if student_too:
        assert value.item() == pytest.approx(oracle(student[:, :4], teacher[:, :4], 2.0))
        assert not student.grad[:, 4:].any()
    else:
        assert value.isfinite()
        assert (student.grad[:, 4:] > 0).all(), "the student is to give them less"


@pytest.mark.parametrize("junk", [0.0, INF, -INF, float("nan")])
@pytest.mark.parametrize("valid", [[False, False, False], [True, False, True]])
def test_what_stands_at_masked_positions_does_not_matter(junk: float, valid: list[bool]) -> None:
    """Pitfall 3: all masked is 0 with its graph; 0 * NaN is NaN in a gradient too."""
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    student, teacher = torch.randn(3, 4, dtype=torch.float64) @ weight, logits(3, 5)
    student = torch.where(torch.tensor(valid)[:, None], student, student * junk)
    teacher[~torch.tensor(valid)] = junk
    value = soft_target(student, teacher, 2.0, torch.tensor(valid))
    assert value.requires_grad
    if not any(valid):
        assert value.item() == 0
    (grad,) = torch.autograd.grad(value, student)
    assert grad.isfinite().all()
    assert not grad[~torch.tensor(valid)].any()
    assert bool(grad.any()) == any(valid)


def test_nothing_at_all_is_zero_with_its_graph() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    value = soft_target(student, torch.zeros(0, 5))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4).requires_grad_()
    soft_target(student, teacher).backward()
    assert teacher.grad is None
    assert not soft_target(student.detach(), teacher).requires_grad


def test_inputs_are_left_alone() -> None:
    student, teacher, valid = logits(3, 4), logits(3, 4), torch.tensor([True, False, True])
    before = student.clone(), teacher.clone()
    soft_target(student, teacher, 2.0, valid)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*positive"):
        soft_target(torch.zeros(2, 3), torch.zeros(2, 3), temperature)


def test_other_classes_or_other_inputs() -> None:
    with pytest.raises(ValueError, match="student scores 10 classes and the teacher 12"):
        soft_target(torch.zeros(2, 10), torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"\[2, 10\] and teacher logits \[3, 10\].*same inputs"):
        soft_target(torch.zeros(2, 10), torch.zeros(3, 10))


@pytest.mark.parametrize("valid", [torch.ones(2), torch.ones(3, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)])
def test_valid_of_another_form(valid: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bool \[2\] is needed"):
        soft_target(torch.zeros(2, 10), torch.zeros(2, 10), valid=valid)


def test_mix_weighs_and_at_its_ends_is_one_loss_alone() -> None:
    soft, hard, bad = torch.tensor(2.0), torch.tensor(10.0), torch.tensor(float("nan"))
    assert mix(soft, hard, 0.75).item() == 4.0
    assert mix(bad, hard, 0).item() == 10.0
    assert mix(soft, bad, 1).item() == 2.0
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha is"):
            mix(soft, hard, alpha)
