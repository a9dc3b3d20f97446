"""Soft and hard loss without logits of [tokens, vocabulary]."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill.language import FactoredLogits, chunked_soft_target, chunked_terms
from distill.losses import mix, soft_target


def problem(dtype=torch.float64, shape=(3, 5), bias=True, v=11, d=4, e=6):
    made = {
        "student_hidden": torch.randn(*shape, d, dtype=dtype, requires_grad=True),
        "student_weight": torch.randn(v, d, dtype=dtype, requires_grad=True),
        "teacher_hidden": torch.randn(*shape, e, dtype=dtype, requires_grad=True),
        "teacher_weight": torch.randn(v, e, dtype=dtype, requires_grad=True),
    }
    if bias:
        made["student_bias"] = torch.randn(v, dtype=dtype, requires_grad=True)
        made["teacher_bias"] = torch.randn(v, dtype=dtype, requires_grad=True)
    return made, torch.randint(v, shape)


def naive(made, temperature, labels, alpha, valid):
    """Both heads on every token, then the plain losses."""
    student = F.linear(made["student_hidden"], made["student_weight"], made.get("student_bias"))
    teacher = F.linear(made["teacher_hidden"], made["teacher_weight"], made.get("teacher_bias"))
    soft = soft_target(student, teacher, temperature, valid)
    if alpha == 1:
        return soft
    skipped = labels if valid is None else labels.masked_fill(~valid, -100)
    flat = student.float() if student.dtype == torch.bfloat16 else student
    hard = F.cross_entropy(flat.flatten(0, -2), skipped.flatten(), reduction="sum") / (skipped != -100).sum().clamp(
        min=1
    )
    return mix(soft, hard, alpha)


def gradients(loss, made):
    mine = [name for name in made if name.startswith("student")]
    return dict(zip(mine, torch.autograd.grad(loss, [made[name] for name in mine])))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (1.0, 0.5), (4.0, 0.3), (0.5, 1.0), (2.0, 0.0)])
@pytest.mark.parametrize("chunk", [1, 4, 15, 99])
def test_chunked_is_both_heads_and_the_plain_losses(chunk, temperature, alpha, bias, masked):
    made, labels = problem(bias=bias)
    valid = torch.rand(3, 5) < 0.6 if masked else None
    loss = chunked_soft_target(**made, temperature=temperature, labels=labels, alpha=alpha, valid=valid, chunk=chunk)
    expected = naive(made, temperature, labels, alpha, valid)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = gradients(3 * loss, made), gradients(3 * expected, made)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-12, atol=1e-12)


def test_value_is_the_formula_in_python_floats():
    """Eq. 1 of Hinton et al. 2015 for both, and T^2 KL(p || q) + cross-entropy, token by token."""
    made, labels = problem(shape=(3,), v=5)
    temperature, alpha, total = 2.0, 0.25, 0.0
    for n in range(3):
        rows = {}
        for who in ("student", "teacher"):
            hidden, weight, bias = (made[f"{who}_{what}"].detach() for what in ("hidden", "weight", "bias"))
            rows[who] = [float(hidden[n] @ w + b) for w, b in zip(weight, bias)]

        def softmax(z, t):
            e = [math.exp(each / t) for each in z]
            return [each / sum(e) for each in e]

        q, p = softmax(rows["student"], temperature), softmax(rows["teacher"], temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        total += alpha * temperature**2 * kl - (1 - alpha) * math.log(softmax(rows["student"], 1.0)[labels[n]])
    loss = chunked_soft_target(**made, temperature=temperature, labels=labels, alpha=alpha, chunk=2)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


def test_gradcheck():
    made, labels = problem(shape=(3,), v=5)
    mine = [made[name] for name in ("student_hidden", "student_weight", "student_bias")]

    def loss(hidden, weight, bias):
        given = {**made, "student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return chunked_soft_target(**given, temperature=2.0, labels=labels, alpha=0.6, chunk=2)

    assert torch.autograd.gradcheck(loss, mine)


def test_the_teacher_gets_no_gradient_and_only_what_is_asked_for_is_made():
    made, labels = problem()
    chunked_soft_target(**made, labels=labels, alpha=0.5).backward()
    assert all((tensor.grad is None) == name.startswith("teacher") for name, tensor in made.items())
    for frozen in ("student_hidden", "student_weight", "student_bias"):
        given = {**made, frozen: made[frozen].detach()}
        rest = [tensor for name, tensor in given.items() if tensor.requires_grad and name.startswith("student")]
        found = torch.autograd.grad(chunked_soft_target(**given, labels=labels, alpha=0.5), rest)
        for tensor, gradient in zip(rest, found):
            torch.testing.assert_close(gradient, tensor.grad)
    with torch.no_grad():
        assert not chunked_soft_target(**made).requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_stands_at_masked_tokens_does_not_matter(bad, alpha):
    made, labels = problem(torch.float32)
    valid = torch.rand(3, 5) < 0.5
    clean = chunked_soft_target(**made, labels=labels, alpha=alpha, valid=valid)
    expected = gradients(clean, made)
    for name in ("student_hidden", "teacher_hidden"):
        made[name] = made[name].detach().masked_fill(~valid[..., None], bad).requires_grad_()
    dirty = chunked_soft_target(**made, labels=labels.masked_fill(~valid, 999), alpha=alpha, valid=valid)
    assert torch.equal(dirty, clean)
    for name, gradient in gradients(dirty, made).items():
        assert torch.equal(gradient, expected[name])
    assert not gradients(chunked_soft_target(**made, valid=valid), made)["student_hidden"][~valid].any()


def test_labels_tell_which_tokens_count():
    made, labels = problem()
    valid = torch.rand(3, 5) < 0.5
    skipped = labels.masked_fill(~valid, -100)
    one = chunked_soft_target(**made, labels=skipped, alpha=0.5)
    torch.testing.assert_close(one, chunked_soft_target(**made, labels=labels, alpha=0.5, valid=valid))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_nothing_valid_is_zero_with_its_graph(alpha):
    made, labels = problem(torch.float32)
    loss = chunked_soft_target(**made, labels=torch.full_like(labels, -100), alpha=alpha)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, made).values())


def test_cross_entropy_of_weight_zero_is_still_computed():
    made, labels = problem()
    student = FactoredLogits(made["student_hidden"], made["student_weight"], None)
    teacher = FactoredLogits(made["teacher_hidden"], made["teacher_weight"], None)
    labels = labels.clone()
    labels[..., 0] = -100
    one = chunked_terms(student, teacher, (1.0, 0.0), temperature=2.0, labels=labels)
    other = chunked_terms(student, teacher, (1.0, 1.0), temperature=2.0, labels=labels)
    plain = F.cross_entropy((student.hidden @ student.weight.T).flatten(0, -2), labels.flatten())
    torch.testing.assert_close(one[2], plain.detach().to(one[2].dtype))
    torch.testing.assert_close(one[1:], other[1:])
    assert one[0].item() == one[1].item()
    alone = chunked_terms(student, teacher, (1.0, 0.0), temperature=2.0, valid=labels != -100)
    assert alone[2].item() == 0
    torch.testing.assert_close(
        torch.autograd.grad(one[0], student.weight), torch.autograd.grad(alone[0], student.weight)
    )


def test_pieces_weighed_by_their_tokens_are_the_whole():
    made, _ = problem(shape=(12,))
    valid = torch.rand(12) < 0.6
    whole = gradients(chunked_soft_target(**made, valid=valid), made)["student_weight"]
    total = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 12)):
        part = {name: tensor[rows] if "hidden" in name else tensor for name, tensor in made.items()}
        loss = chunked_soft_target(**part, valid=valid[rows]) * valid[rows].sum() / valid.sum()
        total += gradients(loss, part)["student_weight"]
    torch.testing.assert_close(total, whole)


def test_the_scale_of_the_gradient_is_about_constant_in_the_temperature():
    made, _ = problem()
    small = {name: 0.05 * tensor.detach().requires_grad_() for name, tensor in made.items()}
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        loss = chunked_soft_target(**small, temperature=temperature)
        norms.append(float(gradients(loss, small)["student_weight"].norm()))
    assert max(norms) < 1.05 * min(norms)


def test_rows_without_probability():
    made, labels = problem()
    cut = {n: t if "hidden" in n else t.detach()[:8].requires_grad_() for n, t in made.items()}
    labels = labels % 8
    mask = torch.tensor([0.0] * 8 + [float("-inf")] * 3, dtype=torch.float64)
    padded = {n: (t.detach() + mask).requires_grad_() if "bias" in n else t for n, t in made.items()}
    losses = [chunked_soft_target(**g, temperature=2.0, labels=labels, alpha=0.5) for g in (cut, padded)]
    torch.testing.assert_close(*losses)
    mine = gradients(losses[1], padded)
    assert (mine["student_weight"][8:] == 0).all()
    assert (mine["student_bias"][8:] == 0).all()
    torch.testing.assert_close(mine["student_hidden"], gradients(losses[0], cut)["student_hidden"])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_half_precision_weights_have_gradients_summed_in_float32(alpha):
    made, labels = problem(torch.bfloat16, (64,), v=50, d=8, e=8)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in made.items()}
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in made.items()}
    loss = chunked_soft_target(**made, labels=labels, alpha=alpha, chunk=4)
    assert loss.dtype == torch.float32
    expected = gradients(naive(exact, 1.0, labels, alpha, None), exact)
    for name, gradient in gradients(loss, made).items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.01, name
    for name, gradient in gradients(chunked_soft_target(**wide, labels=labels, alpha=alpha, chunk=4), wide).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_under_autocast_products_are_half_and_the_softmax_is_not():
    made, labels = problem(torch.float32, (64,), v=50, d=8, e=8)
    exact = gradients(naive(made, 2.0, labels, 0.5, None), made)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_soft_target(**made, temperature=2.0, labels=labels, alpha=0.5, chunk=16)
        student = F.linear(made["student_hidden"], made["student_weight"], made["student_bias"])
    # A teacher computes in its own precision, whatever the student does.
    teacher = F.linear(made["teacher_hidden"], made["teacher_weight"], made["teacher_bias"])
    assert loss.dtype == torch.float32
    expected = mix(soft_target(student, teacher, 2.0), F.cross_entropy(student.float(), labels), 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(loss, made).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.02 * exact[name].norm()


def test_a_loss_scale_keeps_small_float16_gradients():
    made, _ = problem(torch.float16, (4096,), bias=False, v=7, d=2, e=2)
    loss = chunked_soft_target(**made, chunk=4096)
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in made.items()}
    expected = gradients(naive(exact, 1.0, None, 1.0, None), exact)["student_hidden"]
    found = gradients(loss * 4096, made)["student_hidden"].float() / 4096
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_second_derivative_is_refused():
    made, _ = problem()
    loss = chunked_soft_target(**made)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, made["student_hidden"], create_graph=True)


def test_backward_twice_is_the_same():
    made, _ = problem()
    loss = chunked_soft_target(**made)
    first, second = (torch.autograd.grad(loss, made["student_weight"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tensor_is_as_large_as_tokens_times_vocabulary():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(each.numel() for each in made if isinstance(each, torch.Tensor))
            return out

    made, labels = problem(torch.float32, (256,), v=300, d=8, e=8)
    valid = torch.rand(256) < 0.5
    sizes: list[int] = []
    with Largest():
        naive(made, 2.0, labels, 0.5, valid).backward()
    assert max(sizes) == 256 * 300
    sizes.clear()
    with Largest():
        chunked_soft_target(**made, temperature=2.0, labels=labels, alpha=0.5, valid=valid, chunk=16).backward()
    assert max(sizes) == 16 * 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"chunk": 0}, "chunk is 0: give at least 1"),
        ({"alpha": 0.5, "labels": None}, "alpha is 0.5 without labels"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels are \[3\]: give \[3, 5\]"),
        ({"valid": torch.ones(3, 5)}, r"valid is torch.float32 \[3, 5\]: bool \[3, 5\]"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid is torch.bool \[3\]"),
        ({"teacher_hidden": torch.randn(3, 4, 6)}, "run both on the same tokens"),
        (
            {"student_weight": torch.randn(11, 5)},
            r"the student's hidden states are \[3, 5, 4\] and its weight \[11, 5\]",
        ),
        ({"teacher_weight": torch.randn(12, 6)}, r"teacher_bias is \[11\]: give \[12\]"),
        (
            {"teacher_weight": torch.randn(12, 6), "teacher_bias": None},
            r"has 11 rows and the teacher's 12.*\[:vocabulary",
        ),
        ({"alpha": 0.5, "labels": torch.full((3, 5), 11)}, "labels that count are 11 to 11: give 0 to 10"),
        ({"alpha": 0.5, "labels": torch.full((3, 5), -1)}, "labels that count are -1 to -1"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    made, labels = problem(torch.float32)
    with pytest.raises(ValueError, match=message):
        chunked_soft_target(**{**made, "labels": labels, **changes})
