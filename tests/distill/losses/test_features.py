"""What holds for every loss on features, row by row of the table, and what is special to one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill import losses
from tests.helpers import oracles
from tests.helpers.loss_table import FEATURE, Feature

INF, NAN = float("inf"), float("nan")
VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", [FEATURE[name] for name in names], ids=names)


every = of(*FEATURE)
same_width = of("hint", "cosine")
any_width = of(*(name for name in FEATURE if name not in ("hint", "cosine")))
relating = of(*(name for name, loss in FEATURE.items() if loss.relates))
by_sample = of(*(name for name, loss in FEATURE.items() if not loss.relates))
images = of(*(name for name in FEATURE if name != "attention_relation"))


def feature(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def gradient(loss: Feature, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss.call(student, teacher, valid)
    # Not a NaN on the way either, that a mask would hide afterwards.
    with torch.autograd.set_detect_anomaly(True):
        return value.detach(), torch.autograd.grad(value, student)[0]


@every
@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "some"])
def test_equals_the_formula_in_loops(loss: Feature, valid: Tensor | None) -> None:
    student, teacher = feature(4, 5, 6), feature(4, 5, 6)
    found = loss.call(student, teacher, valid)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(loss.oracle(student, teacher, valid), rel=1e-9)


@any_width
def test_widths_may_differ(loss: Feature) -> None:
    student, teacher = feature(4, 5, 4), feature(4, 5, 6)
    assert loss.call(student, teacher, VALID).item() == pytest.approx(loss.oracle(student, teacher, VALID), rel=1e-9)


@same_width
def test_widths_that_need_a_projector(loss: Feature) -> None:
    with pytest.raises(ValueError, match="features are 4 wide and the teacher's 6: project"):
        loss.call(feature(2, 5, 4), feature(2, 5, 6), None)
    with pytest.raises(ValueError, match="features are 4 wide and the teacher's 6: project"):
        loss.call(feature(2, 4, 3, 3), feature(2, 6, 3, 3), None)


@images
def test_images_have_their_channels_second(loss: Feature) -> None:
    student, teacher = feature(4, 6, 5, 1), feature(4, 6, 5, 1)
    found = loss.call(student, teacher, VALID[..., None])
    rows = [image.squeeze(-1).transpose(1, 2) for image in (student, teacher)]
    assert found.item() == pytest.approx(loss.oracle(rows[0], rows[1], VALID), rel=1e-9)


@relating
def test_samples_may_be_of_any_shape(loss: Feature) -> None:
    student, teacher = feature(4, 3, 2, 2), feature(4, 7)
    expected = loss.oracle(student.movedim(1, -1).flatten(1), teacher, None)
    assert loss.call(student, teacher, None).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match=r"\[4, 3, 2, 2\] and the teacher's \[5, 7\].*same samples"):
        loss.call(student, feature(5, 7), None)


@by_sample
def test_positions_must_be_the_same(loss: Feature) -> None:
    with pytest.raises(ValueError, match=r"\[2, 5, 4\] and the teacher's \[2, 6, 4\].*same positions"):
        loss.call(feature(2, 5, 4), feature(2, 6, 4), None)


@every
def test_a_sample_is_masked_as_its_positions_are(loss: Feature) -> None:
    student, teacher, samples = feature(4, 5, 6), feature(4, 5, 6), torch.tensor([True, False, True, True])
    found = loss.call(student, teacher, samples)
    assert torch.allclose(found, loss.call(student, teacher, samples[:, None].expand(4, 5)))
    assert torch.allclose(found, loss.call(student[samples], teacher[samples], None))


@every
@pytest.mark.parametrize("junk", [0.0, INF, -INF, NAN])
@pytest.mark.parametrize("valid", [VALID, torch.zeros_like(VALID)], ids=["some", "none"])
def test_what_stands_at_masked_positions_does_not_matter(loss: Feature, junk: float, valid: Tensor) -> None:
    student, teacher = feature(4, 5, 6), feature(4, 5, 6)
    value, grad = gradient(loss, student, teacher, valid)
    student[~valid], teacher[~valid] = junk, junk
    found, other = gradient(loss, student, teacher, valid)
    assert torch.equal(found, value)
    assert torch.equal(other, grad)
    assert not grad[~valid].any()
    assert bool(grad.any()) == bool(valid.any())
    if not valid.any():
        assert found.item() == 0


@every
def test_gradient_is_that_of_finite_differences(loss: Feature) -> None:
    teacher = feature(4, 3, 4)
    for valid in (None, VALID[:, :3]):
        assert torch.autograd.gradcheck(lambda f: loss.call(f, teacher, valid), feature(4, 3, 4).requires_grad_())  # noqa: B023 - called here


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_where_nothing_differs(loss: Feature, dtype: torch.dtype) -> None:
    """Roots at zero: equal samples have no distance, vectors of zeros no direction, dead positions no attention."""
    teacher = feature(4, 5, 6, dtype=dtype)
    zero = torch.zeros_like(teacher)
    twins = teacher[:1].repeat(4, 1, 1)
    some = teacher.clone()
    some[1], some[2] = 0, some[3]
    for student in (zero, twins, some, teacher):
        for other in (teacher, zero, twins):
            value, grad = gradient(loss, student, other)
            assert value.isfinite()
            assert grad.isfinite().all()
            assert grad.abs().max() < 1e3
    value, grad = gradient(loss, teacher, teacher)
    assert value.abs() < 1e-6
    assert grad.abs().max() < 1e-6


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
@every
def test_is_a_distance(loss: Feature, seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = feature(4, 5, 6), feature(4, 5, 6)
    assert loss.call(student, teacher, None) > 0
    assert loss.call(teacher, teacher, None).abs() < 1e-12
    if loss is FEATURE["hint"]:
        return
    # Lengths do not matter but to the hint and to dot products in a softmax.
    if loss is not FEATURE["attention_relation"]:
        assert torch.allclose(loss.call(3 * student, teacher / 2, None), loss.call(student, teacher, None))


@relating
def test_a_relation_is_blind_to_the_axes_it_is_seen_along(loss: Feature) -> None:
    student, teacher = feature(6, 4), feature(6, 4)
    turn, _ = torch.linalg.qr(feature(4, 4))
    assert torch.allclose(loss.call(student @ turn, teacher, None), loss.call(student, teacher, None))


@by_sample
def test_pieces_of_a_batch_add_up(loss: Feature) -> None:
    student, teacher = feature(4, 5, 6), feature(4, 5, 6)
    parts = [(VALID[s].sum(), loss.call(student[s], teacher[s], VALID[s])) for s in (slice(0, 1), slice(1, 4))]
    total = sum(count * part for count, part in parts) / VALID.sum()
    assert torch.allclose(loss.call(student, teacher, VALID), torch.as_tensor(total))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_full_precision(loss: Feature, dtype: torch.dtype) -> None:
    student, teacher = feature(4, 5, 6, dtype=dtype), feature(4, 5, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, grad = gradient(loss, student, teacher, VALID)
    assert found.dtype == torch.float32
    assert grad.dtype == dtype
    assert found.item() == pytest.approx(loss.oracle(student.double(), teacher.double(), VALID), rel=1e-5)


@every
def test_large_half_precision_features_do_not_overflow(loss: Feature) -> None:
    student, teacher = (1e4 * feature(4, 5, 6)).half(), (1e4 * feature(4, 5, 6)).half()
    assert loss.call(student, teacher, None).isfinite()


@every
def test_the_teacher_gets_no_gradient_and_inputs_are_left_alone(loss: Feature) -> None:
    student, teacher = feature(4, 5, 6), feature(4, 5, 6)
    before = student.clone(), teacher.clone(), VALID.clone()
    loss.call(student.requires_grad_(), teacher.requires_grad_(), VALID).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert all(torch.equal(one, other) for one, other in zip((student, teacher, VALID), before))


@every
def test_a_family_under_vmap_is_its_members_one_by_one(loss: Feature) -> None:
    students, teacher = feature(3, 4, 5, 6), feature(4, 5, 6)
    found = torch.func.vmap(torch.func.grad(lambda f: loss.call(f, teacher, VALID)))(students)
    for one, grad in zip(students, found):
        assert torch.allclose(gradient(loss, one, teacher, VALID)[1], grad)


@every
def test_can_be_compiled_whole(loss: Feature) -> None:
    given = feature(4, 5, 6), feature(4, 5, 6), VALID
    assert torch.allclose(torch.compile(loss.call, backend="eager", fullgraph=True)(*given), loss.call(*given))


@every
@pytest.mark.parametrize("valid", [torch.ones(4), torch.ones(5).bool(), torch.ones(4, 5, 6).bool(), torch.tensor(True)])
def test_valid_of_another_form(loss: Feature, valid: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bool over leading axes of \[4, 5\] is needed"):
        loss.call(feature(4, 5, 6), feature(4, 5, 6), valid)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: losses.attention_transfer(f[:, 0], f[:, 0]), "with positions"),
        (lambda f: losses.attention_relation(f[:, 0], f[:, 0], heads=2), r"\[B, L, D\] is needed"),
        (lambda f: losses.attention_relation(f, f, heads=5), "heads is 5 and the width 6"),
        (lambda f: losses.attention_relation(f, f[..., :3], heads=2), "heads is 2 and the width 3"),
        (lambda f: losses.attention_relation(f, f, heads=0), "heads is 0"),
        (lambda f: losses.rkd(f, f, distance=0, angle=0), "both 0"),
        (lambda f: losses.rkd(f, f, distance=-1), "distance is -1"),
        (lambda f: losses.rkd(f, f, angle=NAN), "angle is nan"),
        (lambda f: losses.rkd_distance(f[0, 0], f[0, 0]), r"\[6\].*\[B, ...\]"),
    ],
)
def test_what_cannot_be_compared(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(feature(4, 5, 6))


def test_attention_is_of_positions_not_of_channels() -> None:
    """Zagoruyko, Komodakis 2017, equation 2: a sum of squares over channels knows neither their order nor sign."""
    student, teacher = feature(2, 6, 3, 3), feature(2, 4, 3, 3)
    found = losses.attention_transfer(-student[:, torch.randperm(6)], teacher)
    assert torch.allclose(found, losses.attention_transfer(student, teacher))


def test_relations_with_one_head_and_with_many() -> None:
    """Wang et al. 2021, section 3.1: relation heads are no attention heads; more of them see finer."""
    student, teacher = feature(2, 5, 12), feature(2, 5, 24)
    values = [losses.attention_relation(student, teacher, heads=heads).item() for heads in (1, 3, 12)]
    assert len(set(values)) == 3
    assert values[1] == pytest.approx(oracles.attention_relation(student, teacher, 3))


def test_what_is_padded_is_not_related_to() -> None:
    student, teacher = feature(1, 5, 4), feature(1, 5, 4)
    valid = torch.tensor([[True, True, True, False, False]])
    found = losses.attention_relation(student, teacher, valid, heads=2)
    assert torch.allclose(found, losses.attention_relation(student[:, :3], teacher[:, :3], heads=2))


def test_one_sample_has_no_relations() -> None:
    student, teacher = feature(1, 4), feature(1, 4)
    for loss in (losses.rkd_distance, losses.rkd_angle, losses.similarity_preserving):
        assert loss(student, teacher).item() == pytest.approx(0)
