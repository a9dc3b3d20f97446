"""What holds for every loss on logits, row by row of the table, and what is special to one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill import losses
from tests.helpers import oracles
from tests.helpers.loss_table import LOGIT, Logit

INF, NAN = float("inf"), float("nan")


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", [LOGIT[name] for name in names], ids=names)


every = of(*LOGIT)
softening = of(*(name for name, loss in LOGIT.items() if loss.softens))
by_position = of(*(name for name, loss in LOGIT.items() if not loss.relates and not loss.draws))
not_drawn = of(*(name for name, loss in LOGIT.items() if not loss.draws))
with_teacher = of(*(name for name in LOGIT if name != "label_smoothing"))
with_labels = of("dkd", "label_smoothing", "shuffled_off_class")


def logits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape)


def gradient(loss: Logit, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss.call(student, teacher, *rest)
    # Not a NaN on the way either, that a mask would hide afterwards.
    with torch.autograd.set_detect_anomaly(True):
        return value.detach(), torch.autograd.grad(value, student)[0]


@every
@pytest.mark.parametrize("shape", [(2, 2), (5, 10), (3, 4, 7), (2, 3, 2, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_in_loops(loss: Logit, shape: tuple[int, ...], temperature: float, masked: bool) -> None:
    student, teacher, y = logits(*shape), logits(*shape), labels(*shape[:-1], classes=shape[-1])
    valid = torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % 3 > 0 if masked else None
    if loss.relates and valid is not None and valid.sum() < 2:
        valid = None  # a single position has no relations
    found = loss.call(student, teacher, temperature, valid, y)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.item() == pytest.approx(loss.oracle(student, teacher, temperature, valid, y), rel=1e-9, abs=1e-12)


@every
def test_one_position_without_a_batch(loss: Logit) -> None:
    student, teacher, y = logits(6), logits(6), torch.tensor(2)
    found = loss.call(student, teacher, 2.0, None, y)
    assert found.shape == ()
    assert torch.allclose(found, loss.call(student[None], teacher[None], 2.0, None, y[None]))


@not_drawn
def test_the_order_of_the_classes_does_not_matter(loss: Logit) -> None:
    student, teacher, y = logits(5, 6), logits(5, 6), labels(5, classes=6)
    order = torch.randperm(6)
    found = loss.call(student[:, order], teacher[:, order], 2.0, None, order.argsort()[y])
    assert torch.allclose(found, loss.call(student, teacher, 2.0, None, y))


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.1, 20), shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
@every
def test_is_a_divergence(loss: Logit, seed: int, temperature: float, shift: float) -> None:
    """At least 0, 0 where both agree, and blind to what a softmax is blind to."""
    torch.manual_seed(seed)
    student, teacher, y = logits(4, 6), logits(4, 6), labels(4, classes=6)
    value = loss.call(student, teacher, temperature, None, y)
    assert value >= -1e-9
    if loss.zero_when_equal:
        assert loss.call(teacher, teacher, temperature, None, y).abs() <= 1e-9 * temperature**2
    if loss is not LOGIT["logit_mse"]:
        assert torch.allclose(loss.call(student + shift, teacher - shift, temperature, None, y), value, atol=1e-8)


@every
def test_gradient_is_that_of_finite_differences(loss: Logit) -> None:
    teacher, y, valid = logits(4, 5), labels(4, classes=5), torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda z: loss.call(z, teacher, 3.0, valid, y), logits(4, 5).requires_grad_())


@softening
def test_gradient_has_about_the_same_scale_at_every_temperature(loss: Logit) -> None:
    """Without the factor T^2 it would fall about 64-fold from T = 1 to 8, with it twice it would rise as much."""
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        torch.manual_seed(0)
        _, grad = gradient(
            loss, logits(64, 10, scale=1.0), logits(64, 10, scale=1.0), temperature, None, labels(64, classes=10)
        )
        # A correlation does not shrink as T grows: of DIST the authors' T^2 is all that is left.
        norms.append(grad.norm().item() / (temperature**2 if loss is LOGIT["dist"] else 1))
    assert max(norms) / min(norms) < 1.5


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_full_precision(loss: Logit, dtype: torch.dtype) -> None:
    student, teacher, y = logits(16, 100, dtype=dtype), logits(16, 100, dtype=dtype), labels(16, classes=100)
    found, grad = gradient(loss, student, teacher, 4.0, None, y)
    assert found.dtype == torch.float32
    assert grad.dtype == dtype
    assert found.item() == pytest.approx(loss.oracle(student.double(), teacher.double(), 4.0, None, y), rel=2e-5)


@every
def test_autocast_does_not_reach_inside(loss: Logit) -> None:
    student, teacher, y = logits(8, 50, dtype=torch.float32), logits(8, 50, dtype=torch.float32), labels(8, classes=50)
    expected = loss.call(student, teacher, 4.0, None, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.call(student, teacher, 4.0, None, y), expected)
        half = loss.call(student.bfloat16(), teacher, 4.0, None, y)
    assert half.dtype == torch.float32


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_extreme_logits_stay_finite(loss: Logit, dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, -1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0], [-1e4, 1e4, 0], [0, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    value, grad = gradient(loss, student, teacher, temperature, None, torch.tensor([1, 1, 2, 0]))
    assert value.isfinite()
    if dtype != torch.float16 or temperature == 1.0:  # 65504 is all that a half gradient holds
        assert grad.isfinite().all()


@every
@pytest.mark.parametrize("junk", [0.0, INF, -INF, NAN])
@pytest.mark.parametrize("valid", [[False, False, False, False], [True, False, True, True]])
def test_what_stands_at_masked_positions_does_not_matter(loss: Logit, junk: float, valid: list[bool]) -> None:
    mask = torch.tensor(valid)
    student, teacher, y = logits(4, 5), logits(4, 5), labels(4, classes=5)
    value, grad = gradient(loss, student, teacher, 2.0, mask, y)
    student[~mask], teacher[~mask], y[~mask] = junk, junk, -100
    found, other = gradient(loss, student, teacher, 2.0, mask, y)
    assert torch.equal(found, value)
    assert torch.equal(other, grad)
    assert not grad[~mask].any()
    assert bool(grad.any()) == any(valid)
    if not any(valid):
        assert found.item() == 0


@every
def test_a_hidden_layer_behind_masked_junk_gets_a_finite_gradient(loss: Logit) -> None:
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    valid, teacher, y = torch.tensor([True, False, True]), logits(3, 5), labels(3, classes=5)
    student = torch.randn(3, 4, dtype=torch.float64) @ weight
    student = student + torch.tensor([0.0, NAN, 0.0], dtype=torch.float64)[:, None]
    (grad,) = torch.autograd.grad(loss.call(student, teacher, 2.0, valid, y), weight)
    assert grad.isfinite().all()
    assert grad.any()


@every
def test_can_be_compiled_whole(loss: Logit) -> None:
    """One graph, no break; the compiler's back end is not what is tested."""
    given = logits(3, 4), logits(3, 4), torch.tensor([True, False, True]), torch.tensor([1, -100, 0])
    values = []
    for module in (loss.module(2.0), torch.compile(loss.module(2.0), backend="eager", fullgraph=True)):
        torch.manual_seed(0)
        values.append(module(*given))
    assert torch.allclose(*values)


@every
def test_nothing_at_all_is_zero_with_its_graph(loss: Logit) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    value = loss.call(student, torch.zeros(0, 5), 2.0, None, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None


@by_position
def test_pieces_of_a_batch_add_up(loss: Logit) -> None:
    """A mean over valid positions: weighed by their numbers, pieces give value and gradient of the whole."""
    student, teacher, y = logits(6, 5), logits(6, 5), labels(6, classes=5)
    valid = torch.tensor([True, False, True, True, False, True])
    value, grad = gradient(loss, student, teacher, 2.0, valid, y)
    parts = [gradient(loss, student[s], teacher[s], 2.0, valid[s], y[s]) for s in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(value, (1 * parts[0][0] + 3 * parts[1][0]) / 4)
    assert torch.allclose(grad, torch.cat([1 * parts[0][1], 3 * parts[1][1]]) / 4)


@every
def test_classes_that_both_rule_out_do_not_count(loss: Logit) -> None:
    """Padded rows of a vocabulary: as if they were not there, in value and gradient."""
    student, teacher, y = logits(5, 4), logits(5, 4), labels(5, classes=4)
    gone = torch.full((5, 3), -INF, dtype=torch.float64)
    call = loss.call
    if loss.draws:  # the same whatever is drawn
        teacher = torch.zeros_like(teacher).scatter(-1, y[:, None], 1.0)
    value = call(student, teacher, 2.0, None, y)
    (grad,) = torch.autograd.grad(call(student.requires_grad_(), teacher, 2.0, None, y), student)
    padded = torch.cat([student.detach(), gone], -1).requires_grad_()
    found = call(padded, torch.cat([teacher, gone], -1), 2.0, None, y)
    (other,) = torch.autograd.grad(found, padded)
    assert torch.allclose(found, value)
    assert torch.allclose(other[:, :4], grad)
    assert not other[:, 4:].any()


@every
def test_classes_that_the_teacher_rules_out_are_no_trouble(loss: Logit) -> None:
    student, teacher, y = logits(5, 6), logits(5, 6), labels(5, classes=4)
    teacher[:, 4:] = -INF
    value, grad = gradient(loss, student, teacher, 2.0, None, y)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert grad[:, :4].any()


@every
def test_the_teacher_gets_no_gradient(loss: Logit) -> None:
    student, teacher, y = logits(3, 4).requires_grad_(), logits(3, 4).requires_grad_(), labels(3, classes=4)
    loss.call(student, teacher, 2.0, None, y).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not loss.call(student.detach(), teacher, 2.0, None, y).requires_grad


@every
def test_inputs_are_left_alone(loss: Logit) -> None:
    given = logits(3, 4), logits(3, 4), torch.tensor([True, False, True]), torch.tensor([1, -100, 0])
    before = [tensor.clone() for tensor in given]
    loss.call(given[0], given[1], 2.0, *given[2:])
    assert all(torch.equal(one, other) for one, other in zip(given, before))


@not_drawn
def test_a_family_under_vmap_is_its_members_one_by_one(loss: Logit) -> None:
    students, teacher, y = logits(3, 4, 5), logits(4, 5), labels(4, classes=5)
    valid = torch.tensor([True, False, True, True])
    found = torch.func.vmap(lambda z: torch.func.grad(lambda s: loss.call(s, teacher, 2.0, valid, y))(z))(students)
    for one, grad in zip(students, found):
        assert torch.allclose(gradient(loss, one, teacher, 2.0, valid, y)[1], grad)


@softening
@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, NAN])
def test_temperature_out_of_range(loss: Logit, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*positive"):
        loss.call(logits(2, 3), logits(2, 3), temperature, None, labels(2, classes=3))


@with_teacher
def test_other_classes_or_other_inputs(loss: Logit) -> None:
    with pytest.raises(ValueError, match="student scores 10 classes and the teacher 12"):
        loss.call(torch.zeros(2, 10), torch.zeros(2, 12), 2.0, None, labels(2, classes=10))
    with pytest.raises(ValueError, match=r"\[2, 10\] and teacher logits \[3, 10\].*same inputs"):
        loss.call(torch.zeros(2, 10), torch.zeros(3, 10), 2.0, None, labels(2, classes=10))


@every
@pytest.mark.parametrize("valid", [torch.ones(2), torch.ones(3, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)])
def test_valid_of_another_form(loss: Logit, valid: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bool \[2\] is needed"):
        loss.call(torch.zeros(2, 10), torch.zeros(2, 10), 2.0, valid, labels(2, classes=10))


@with_labels
def test_labels_that_are_no_classes(loss: Logit) -> None:
    call, student, teacher = loss.call, logits(3, 4), logits(3, 4)
    for wrong in ([0, 4, 1], [0, -100, 1]):
        with pytest.raises(ValueError, match=r"labels go from .* 4 classes.*valid=labels != -100"):
            call(student, teacher, 2.0, None, torch.tensor(wrong))
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"int64 \[3\] is needed"):
            call(student, teacher, 2.0, None, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s, y: losses.jsd(s, s, beta=1.5), "beta is 1.5"),
        (lambda s, y: losses.jsd(s, s, beta=NAN), "beta is nan"),
        (lambda s, y: losses.dkd(s, s, labels=y, alpha=-1), "alpha is -1"),
        (lambda s, y: losses.dkd(s, s, labels=y, beta=INF), "beta is inf"),
        (lambda s, y: losses.dkd(s[:, :1], s[:, :1], labels=y), "a softmax over one class is always 1"),
        (lambda s, y: losses.soft_target(s[:, :1], s[:, :1]), "a softmax over one class is always 1"),
        (lambda s, y: losses.soft_target(s[0, 0], s[0, 0]), r"logits are \[\], and a softmax"),
        (lambda s, y: losses.dist(s[:, :1], s[:, :1]), "a softmax over one class"),
        (lambda s, y: losses.label_smoothing(s[:, :1], y), "a softmax over one class"),
        (lambda s, y: losses.standardize(s[:, :1]), "a softmax over one class"),
        (lambda s, y: losses.dist(s, s, inter=NAN), "inter is nan"),
        (lambda s, y: losses.dist(s, s, intra=-0.1), "intra is -0.1"),
        (lambda s, y: losses.label_smoothing(s, y, 1.0), "smoothing is 1.0"),
        (lambda s, y: losses.standardize(s, torch.ones(2)), r"bool \[3\] is needed"),
    ],
)
def test_numbers_out_of_range(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(logits(3, 4), torch.tensor([0, 0, 0]))


# Jensen-Shannon


def test_jsd_at_its_ends_is_the_two_divergences() -> None:
    student, teacher = logits(5, 7), logits(5, 7)
    assert torch.equal(losses.jsd(student, teacher, 2.0, beta=0), losses.soft_target(student, teacher, 2.0))
    assert torch.equal(losses.jsd(student, teacher, 2.0, beta=1), losses.reverse_kl(student, teacher, 2.0))


def test_jsd_near_its_ends_goes_to_them_by_beta() -> None:
    """Agarwal et al. 2024, below equation 1: JSD(beta) / beta -> KL(p || q) as beta -> 0."""
    student, teacher = logits(5, 7), logits(5, 7)
    for close in (1e-6, 1 - 1e-6):
        end = round(close)
        found = losses.jsd(student, teacher, beta=close) / (1e-6)
        assert found.item() == pytest.approx(losses.jsd(student, teacher, beta=end).item(), rel=1e-3)


def test_jsd_is_symmetric_and_at_most_log_2() -> None:
    student, teacher = logits(5, 7), logits(5, 7)
    assert torch.allclose(losses.jsd(student, teacher), losses.jsd(teacher, student))
    assert torch.allclose(losses.jsd(student, teacher, beta=0.2), losses.jsd(teacher, student, beta=0.8))
    far = torch.tensor([[500.0, 0.0]])
    assert losses.jsd(far, far.flip(-1)).item() == pytest.approx(math.log(2))


# Reverse KL


def test_reverse_kl_is_the_other_way_round() -> None:
    student, teacher = logits(5, 7), logits(5, 7)
    assert torch.allclose(losses.reverse_kl(student, teacher, 3.0), losses.soft_target(teacher, student, 3.0))


# Squared logits


def test_soft_targets_go_to_squared_logits_as_the_temperature_grows() -> None:
    """Hinton et al. 2015, equation 4: 1 / (2 C) ||z^s - z^t||^2 of centred logits."""
    student, teacher = logits(5, 7), logits(5, 7)
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    hot = losses.soft_target(student, teacher, 1e4)
    assert hot.item() == pytest.approx(losses.logit_mse(student, teacher).item() / 14, rel=1e-2)


# Decoupled


def test_dkd_with_the_coupled_weight_is_the_soft_target() -> None:
    """Zhao et al. 2022, equation 6: KD = TCKD + (1 - p_y) NCKD."""
    for _ in range(5):
        student, teacher, y = logits(1, 6), logits(1, 6), labels(1, classes=6)
        rest = 1 - (teacher / 3).softmax(-1)[0, y].item()
        found = losses.dkd(student, teacher, 3.0, labels=y, alpha=1, beta=rest)
        assert torch.allclose(found, losses.soft_target(student, teacher, 3.0))


def test_dkd_of_a_teacher_sure_to_the_last_bit() -> None:
    """1 - p_y = 1 - 1.0 = 0 in float32, and log 0; in log space it is e^-50, and the shares of the rest are whole."""
    teacher, student = torch.tensor([[50.0, 0.0, 1.0]]), torch.tensor([[0.0, 60.0, 0.0]])
    y = torch.tensor([0])
    assert 1 - teacher.softmax(-1)[0, 0] < 1e-12
    found, grad = gradient(LOGIT["dkd"], student, teacher, 1.0, None, y)
    expected = oracles.dkd(student.double(), teacher.double(), y, 1.0, None, 0.7, 3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert grad.isfinite().all()


def test_dkd_of_a_teacher_that_rules_all_others_out() -> None:
    student, teacher = logits(2, 3), torch.tensor([[0.0, -INF, -INF], [1.0, 2.0, 3.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    value, grad = gradient(LOGIT["dkd"], student, teacher, 1.0, None, y)
    assert grad.isfinite().all()
    alone = 0.7 * F.cross_entropy(student[:1], y[:1]) + losses.dkd(
        student[1:], teacher[1:], 1.0, labels=y[1:], alpha=0.7, beta=3
    )
    assert torch.allclose(value, alone / 2)


# Correlated


def test_dist_of_an_affine_image_of_the_teacher_is_zero() -> None:
    """Huang et al. 2022, equation 7: correlation is invariant to a positive scale and a shift of probabilities."""
    p = torch.rand(6, 5, dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)
    q = 0.3 * p + 0.7 / 5
    assert losses.dist(q.log(), p.log()).item() == pytest.approx(0, abs=1e-12)
    assert losses.soft_target(q.log(), p.log(), 1.0) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_where_nothing_varies(dtype: torch.dtype) -> None:
    """An untrained student is constant, and a teacher may be: no relation, no NaN, no gradient out of rounding."""
    flat, bumpy = torch.full((4, 7), 0.1, dtype=dtype), logits(4, 7, dtype=dtype)
    y = labels(4, classes=7)
    value, grad = gradient(LOGIT["dist"], flat, bumpy, 1.0, None, y)
    assert value.item() == pytest.approx(2 + 0.5)
    assert grad.isfinite().all()
    assert grad.abs().max() < 10
    value, grad = gradient(LOGIT["dist"], bumpy, flat, 1.0, None, y)
    assert value.item() == 0
    assert not grad.any()
    # The mean of many equal numbers is not quite theirs.
    flat = logits(50, 1, dtype=dtype).expand(50, 999)
    _, grad = gradient(LOGIT["dist"], flat, logits(50, 999, dtype=dtype), 1.0, None, labels(50, classes=999))
    assert grad.abs().max() < 1


def test_dist_of_one_position_relates_classes_only() -> None:
    student, teacher = logits(1, 7), logits(1, 7)
    assert torch.allclose(losses.dist(student, teacher, inter=1, intra=5), losses.dist(student, teacher, intra=0))


def test_dist_takes_all_leading_axes_as_the_batch() -> None:
    student, teacher = logits(2, 3, 5), logits(2, 3, 5)
    assert torch.allclose(losses.dist(student, teacher), losses.dist(student.flatten(0, 1), teacher.flatten(0, 1)))


# Standardised


@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 3, 7)])
def test_standardize_equals_the_formula_in_loops(shape: tuple[int, ...]) -> None:
    z = logits(*shape)
    z[..., -1] = -INF
    expected = [oracles.standardize(row) for row in z.reshape(-1, shape[-1]).tolist()]
    found = losses.standardize(z)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64).view(shape), rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_standardize_is_blind_to_shift_and_scale(seed: int, scale: float, shift: float) -> None:
    torch.manual_seed(seed)
    z = logits(3, 8)
    found = losses.standardize(scale * z + shift)
    assert torch.allclose(found, losses.standardize(z), atol=1e-6)
    assert torch.allclose(found.mean(-1), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.std(-1, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_standardize_of_equal_logits(dtype: torch.dtype, value: float) -> None:
    z = torch.full((2, 7), value, dtype=dtype, requires_grad=True)
    found = losses.standardize(z)
    assert found.abs().max() < 1e-3
    found.square().sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert losses.standardize(torch.full((1, 3), -INF)).eq(-INF).all()


def test_standardize_precision_and_gradient() -> None:
    assert losses.standardize(logits(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.standardize(logits(2, 3, dtype=torch.float32)).dtype == torch.float32
    assert torch.autograd.gradcheck(losses.standardize, logits(3, 4).requires_grad_())


def test_standardize_with_masked_junk() -> None:
    student, teacher, valid = logits(3, 4), logits(3, 4), torch.tensor([True, False, True])
    student[1] = teacher[1] = NAN
    student.requires_grad_()
    value = losses.soft_target(losses.standardize(student, valid), losses.standardize(teacher, valid), 2.0, valid)
    (grad,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert grad.isfinite().all()
    kept = [losses.standardize(z.detach()[valid]) for z in (student, teacher)]
    assert torch.allclose(value, losses.soft_target(*kept, 2.0))


WEIGHTED = {
    "soft_target": lambda s, t, v, y, w: losses.soft_target(s, t, 2.0, v, class_weights=w),
    "reverse_kl": lambda s, t, v, y, w: losses.reverse_kl(s, t, 2.0, v, class_weights=w),
    "jsd": lambda s, t, v, y, w: losses.jsd(s, t, 2.0, v, beta=0.3, class_weights=w),
    "forward jsd": lambda s, t, v, y, w: losses.jsd(s, t, 2.0, v, beta=0.0, class_weights=w),
    "dkd": lambda s, t, v, y, w: losses.dkd(s, t, 2.0, v, labels=y, class_weights=w),
}


@pytest.mark.parametrize("call", WEIGHTED.values(), ids=WEIGHTED)
def test_class_weights_count_positions_by_what_the_teacher_expects(call: Any) -> None:
    student, teacher, y = logits(5, 4), logits(5, 4), torch.randint(4, (5,))
    weights, valid = [0.5, 1.0, 3.0, 0.0], torch.tensor([True, False, True, True, True])
    values = [call(student[i : i + 1], teacher[i : i + 1], None, y[i : i + 1], None) for i in range(5)]
    expected = [sum(w * p for w, p in zip(weights, teacher[i].softmax(0).tolist())) * values[i] for i in range(5)]
    torch.testing.assert_close(call(student, teacher, None, y, weights), sum(expected) / 5)
    torch.testing.assert_close(call(student, teacher, valid, y, weights), (sum(expected) - expected[1]) / 4)
    equal = call(student.requires_grad_(), student.detach(), None, y, weights)  # the optimum is where it was
    assert torch.allclose(torch.autograd.grad(equal, student)[0], torch.zeros(5, 4, dtype=student.dtype), atol=1e-12)


def test_class_weights_of_a_certain_teacher_are_those_of_cross_entropy() -> None:
    student, y, weights = logits(5, 4), torch.tensor([0, 2, 2, 1, 3]), [0.5, 1.0, 3.0, 0.1]
    certain = torch.full((5, 4), -INF, dtype=student.dtype).scatter(1, y[:, None], 0.0)
    expected = F.cross_entropy(student, certain.exp(), weight=torch.tensor(weights, dtype=student.dtype))
    torch.testing.assert_close(losses.soft_target(student, certain, 1.0, class_weights=weights), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "class_weights are 1 for 4 classes"), ([-1.0] * 4, "at least 0"), ([0.0] * 4, "one of them above")],
)
def test_class_weights_that_do_not_fit(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.SoftTarget(class_weights=weights)(logits(3, 4), logits(3, 4))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_a_mask_of_every_position_costs_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a copy of the logits nor another bit; and of some, only these are looked at."""
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    full, some = torch.ones(shape[:-1], dtype=torch.bool), torch.rand(shape[:-1]) < 0.5
    found = losses.soft_target(student, teacher, 4.0, full)
    assert torch.equal(found, losses.soft_target(student, teacher, 4.0))
    sizes = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda z, dim: sizes.append(z.numel()) or softmax(z, dim))
    losses.soft_target(student, teacher, 4.0, some)
    assert sizes == [5 * int(some.sum())] * 2


def test_soft_targets_under_vmap() -> None:
    student, teacher, valid = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4) < 0.6
    found = torch.func.vmap(lambda s, t, v: losses.soft_target(s, t, 2.0, v))(student, teacher, valid)
    expected = torch.stack([losses.soft_target(s, t, 2.0, v) for s, t, v in zip(student, teacher, valid)])
    torch.testing.assert_close(found, expected)
