import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.tasks import naive
from workbench.tasks import Classification, cross_entropy


@pytest.mark.parametrize("shape", [(6,), (2, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ignore", [None, -100, 2])
def test_loss_is_the_formula(shape, smoothing, ignore):
    torch.manual_seed(0)
    logits = 3 * torch.randn(*shape, 4, dtype=torch.float64)
    targets = torch.randint(4, shape)
    if ignore == -100:
        targets.flatten()[::3] = -100
    loss = Classification(4, smoothing, ignore).loss(logits, (None, targets))
    assert loss.item() == pytest.approx(naive(logits, targets, smoothing, ignore), rel=1e-12)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_loss_in_pieces_weighed_by_valid_positions_is_the_whole(data):
    seed = data.draw(st.integers(0, 1000))
    cuts = sorted(data.draw(st.lists(st.integers(1, 7), max_size=3, unique=True)))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (8, 3), generator=generator)
    targets[torch.rand(8, 3, generator=generator) < 0.5] = -100
    task = Classification(5, 0.1, -100)
    whole = task.loss(logits, (None, targets))
    parts = [(a, b) for a, b in zip([0, *cuts], [*cuts, 8])]
    counts = [task.valid((None, targets[a:b])).sum() for a, b in parts]
    losses = [task.loss(logits[a:b], (None, targets[a:b])) for a, b in parts]
    total = sum(counts).clamp(min=1)
    torch.testing.assert_close(sum(n * x for n, x in zip(counts, losses)) / total, whole)


def test_all_ignored_is_zero_with_its_graph():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = Classification(4, 0.1, ignore_index=-100).loss(logits, {"labels": torch.full((2, 3), -100)})
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradient():
    targets = torch.tensor([0, 2, -100])
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, 0.2, -100), (logits,))


def test_half_precision_is_scored_in_float32():
    logits = torch.randn(64, 10).bfloat16()
    targets = torch.randint(10, (64,))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), targets), rtol=0, atol=0)


def test_a_padding_label_that_was_not_announced_is_an_error():
    with pytest.raises(ValueError, match="labels go from -100 to 1"):
        Classification(4).loss(torch.randn(2, 4), (None, torch.tensor([1, -100])))


@pytest.mark.parametrize("ignore", [None, -100])
@pytest.mark.parametrize("shape", [(16,), (4, 6)])
def test_metrics_are_exact_over_uneven_batches(shape, ignore):
    torch.manual_seed(1)
    logits, targets = torch.randn(*shape, 5), torch.randint(5, shape)
    if ignore is not None:
        targets[torch.rand(shape) < 0.4] = ignore
    metrics = Classification(5, label_smoothing=0.2, ignore_index=ignore).metrics("val/")
    for a, b in [(0, 1), (1, 3), (3, len(logits))]:
        metrics.update(logits[a:b], targets[a:b])
    values = metrics.compute()
    assert set(values) == {"val/accuracy", "val/nll"}
    theirs = MulticlassAccuracy(5, average="micro", ignore_index=ignore)(logits.flatten(0, -2), targets.flatten())
    assert values["val/accuracy"].item() == pytest.approx(theirs.item())
    assert values["val/nll"].item() == pytest.approx(naive(logits, targets, 0.0, ignore), rel=1e-5)
    metrics.reset()
    metrics.update(logits[:1], logits[:1].argmax(-1))
    assert metrics.compute()["val/accuracy"].item() == 1.0


def test_metrics_over_nothing_are_nan():
    metrics = Classification(3, ignore_index=-1).metrics()
    metrics.update(torch.randn(2, 3), torch.tensor([-1, -1]))
    assert all(value.isnan() for value in metrics.compute().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_stands_at_ignored_positions_does_not_matter(bad: float) -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [4, 0, -100]])
    clean = logits.clone().requires_grad_()
    logits[labels == -100] = bad
    logits.requires_grad_()
    losses = [cross_entropy(z, labels, label_smoothing=0.1, ignore_index=-100) for z in (clean, logits)]
    assert torch.equal(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (clean, logits))]
    assert torch.equal(*gradients)
    assert not gradients[0][labels == -100].any()


def test_a_label_that_is_no_class_is_named():
    with pytest.raises(ValueError, match="labels go from 0 to 6 and logits score 3 classes"):
        cross_entropy(torch.randn(3, 3), torch.tensor([0, 6, -1]), ignore_index=-1)


def test_dense_logits_are_scored_in_rows_where_it_must_be_deterministic(monkeypatch):
    """On a GPU torch has no deterministic cross-entropy of [B, C, H, W]."""
    seen, plain = [], nn.functional.cross_entropy
    logits, targets = torch.randn(2, 3, 4, 5).movedim(1, -1), torch.randint(3, (2, 4, 5))
    expected = cross_entropy(logits, targets)
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda z, *a, **k: seen.append(z.ndim) or plain(z, *a, **k))
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(cross_entropy(logits, targets), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [2]
