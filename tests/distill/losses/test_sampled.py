import pytest
import torch
from torch import Tensor

from distill.losses import sampled_soft_target, soft_target
from tests.helpers import oracles

INF, NAN = float("inf"), float("nan")


def sample(teacher: Tensor, draws: int, power: float, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weights and log-probabilities of draws from p^power, normalised: Anshumann et al. 2025, section 3.4."""
    log_p = (teacher / temperature).log_softmax(-1)
    proposal = (power * log_p).softmax(-1)
    ids = torch.multinomial(proposal.flatten(0, -2), draws, replacement=True).view(*teacher.shape[:-1], draws)
    chosen = log_p.gather(-1, ids)
    return ids, chosen.exp() / proposal.gather(-1, ids) / draws, chosen


@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 9), (9,)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_the_formula_in_loops(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = torch.randn(*shape, dtype=torch.float64), torch.randn(1, *shape, dtype=torch.float64)
    ids, weights, log_probs = (found[0] for found in sample(teacher, 4, 1.0, temperature))
    found = sampled_soft_target(student, ids, weights, log_probs, temperature)
    assert found.item() == pytest.approx(oracles.sampled_soft_target(student, ids, weights, log_probs, temperature))
    if len(shape) > 1:
        valid = torch.arange(student[..., 0].numel()).view(shape[:-1]) % 2 == 0
        found = sampled_soft_target(student, ids, weights, log_probs, temperature, valid)
        expected = oracles.sampled_soft_target(student, ids, weights, log_probs, temperature, valid)
        assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_of_all_classes_is_exact(temperature: float) -> None:
    student, teacher = torch.randn(4, 6, dtype=torch.float64).requires_grad_(), torch.randn(4, 6, dtype=torch.float64)
    teacher[:, 5] = -INF
    log_p = (teacher / temperature).log_softmax(-1)
    ids = torch.stack([torch.randperm(6) for _ in range(4)])
    log_p = log_p.gather(-1, ids)
    found = sampled_soft_target(student, ids, log_p.exp(), log_p, temperature)
    expected = soft_target(student, teacher, temperature)
    assert torch.allclose(found, expected)
    assert torch.allclose(*(torch.autograd.grad(value, student)[0] for value in (found, expected)))


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_is_unbiased_in_value_and_gradient(power: float) -> None:
    """The mean of 4000 estimates lies within 4 standard errors; the seed is fixed."""
    torch.manual_seed(1)
    student, teacher = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    many, estimates = teacher.expand(4000, 12), student.expand(4000, 12).clone().requires_grad_()
    ids, weights, log_probs = sample(many, 8, power)
    values = torch.func.vmap(sampled_soft_target)(estimates, ids, weights, log_probs)
    (grads,) = torch.autograd.grad(values.sum(), estimates)
    exact = student.clone().requires_grad_()
    full = soft_target(exact, teacher, 1.0)
    (grad,) = torch.autograd.grad(full, exact)
    for found, expected in ((values[:, None], full.detach()[None]), (grads, grad)):
        found = found.detach()
        error = found.std(0) / 4000**0.5
        assert ((found.mean(0) - expected).abs() <= 4 * error).all()


def test_the_top_classes_renormalised_are_biased() -> None:
    """Why it takes weights: the K largest, scaled to a sum of 1, pull the student elsewhere."""
    student, teacher = torch.randn(1, 50, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64)
    log_probs, ids = teacher.log_softmax(-1).topk(8)
    student.requires_grad_()
    values = sampled_soft_target(student, ids, log_probs.softmax(-1), log_probs), soft_target(student, teacher, 1.0)
    top, full = (torch.autograd.grad(value, student)[0] for value in values)
    assert (top - full).norm() > 0.3 * full.norm()


@pytest.mark.parametrize("junk", [INF, -INF, NAN])
def test_what_does_not_count_does_not_matter(junk: float) -> None:
    student, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    ids, weights, log_probs = sample(teacher, 4, 1.0)
    valid = torch.tensor([True, False, True])
    weights[0, 2] = 0
    value = sampled_soft_target(student, ids, weights, log_probs, 1.0, valid)
    log_probs[0, 2], ids[0, 2] = junk, -1
    student[1], weights[1], log_probs[1], ids[1] = junk, junk, junk, 999
    student.requires_grad_()
    found = sampled_soft_target(student, ids, weights, log_probs, 1.0, valid)
    (grad,) = torch.autograd.grad(found, student)
    assert torch.equal(found, value)
    assert grad.isfinite().all()
    assert not grad[1].any()
    nothing = sampled_soft_target(student, ids, weights, log_probs, 1.0, torch.zeros(3, dtype=torch.bool))
    assert nothing.requires_grad
    assert nothing.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_full_precision(dtype: torch.dtype) -> None:
    student = (5 * torch.randn(8, 100)).to(dtype).requires_grad_()
    ids, weights, log_probs = sample(torch.randn(8, 100), 10, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled_soft_target(student, ids, weights.half(), log_probs)
    found.backward()
    assert found.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == dtype
    expected = oracles.sampled_soft_target(
        student.detach().double(), ids, weights.half().double(), log_probs.double(), 1.0
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_has_about_the_same_scale_at_every_temperature() -> None:
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        torch.manual_seed(0)
        student, teacher = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
        log_p = (teacher / temperature).log_softmax(-1)
        value = sampled_soft_target(student, torch.arange(10).expand(64, 10), log_p.exp(), log_p, temperature)
        norms.append(torch.autograd.grad(value, student)[0].norm().item())
    assert max(norms) / min(norms) < 1.5


def test_other_shapes_and_other_classes() -> None:
    student, ids, weights = torch.randn(3, 6), torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=r"ids are \[4, 2\].*\[3, 'K'\]"):
        sampled_soft_target(student, torch.zeros(4, 2, dtype=torch.int64), weights, weights)
    with pytest.raises(ValueError, match=r"weights are \[3, 3\]"):
        sampled_soft_target(student, ids, torch.ones(3, 3), weights)
    with pytest.raises(ValueError, match=r"ids are torch\.float32: int64"):
        sampled_soft_target(student, ids.float(), weights, weights)
    with pytest.raises(ValueError, match=r"ids go from 0 to 7 and the student scores 6 classes"):
        sampled_soft_target(student, torch.tensor([[0, 7]] * 3), weights, weights)
    with pytest.raises(ValueError, match="temperature is 0"):
        sampled_soft_target(student, ids, weights, weights, 0)
    with pytest.raises(ValueError, match=r"bool \[3\] is needed"):
        sampled_soft_target(student, ids, weights, weights, valid=torch.ones(3))
