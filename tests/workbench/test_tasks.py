import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.tokenization_utils_base import BatchEncoding

from workbench.tasks import Classification, Task, cross_entropy


def naive(logits, targets, smoothing=0.0, ignore=None):
    """Position by position, class by class, in python floats."""
    values = []
    classes = logits.shape[-1]
    for z, y in zip(logits.reshape(-1, classes).tolist(), targets.flatten().tolist()):
        if y == ignore:
            continue
        top = max(z)
        log_sum = top + math.log(sum(math.exp(v - top) for v in z))
        q = [(1 - smoothing) * (c == y) + smoothing / classes for c in range(classes)]
        values.append(-sum(weight * (v - log_sum) for weight, v in zip(q, z)))
    return sum(values) / max(len(values), 1)


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
    with pytest.raises(IndexError):
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


def test_monitor_is_one_of_the_metrics():
    task = Classification(3)
    metrics = task.metrics("val/")
    name, direction = task.monitor
    assert f"val/{name}" in metrics.keys()  # noqa: SIM118 - keys() has the prefix
    assert metrics[name].higher_is_better == (direction == "max")
    assert task.metrics() is not task.metrics()


def test_batches():
    task, x, y = Classification(3), torch.randn(2, 4), torch.tensor([0, 1])
    assert task.inputs((x, y)) == ((x,), {})
    assert task.inputs([x, y]) == ((x,), {})
    assert task.inputs((x, x, y)) == ((x, x), {})
    for batch in ({"input_ids": x, "labels": y}, BatchEncoding({"input_ids": x, "labels": y})):
        assert task.inputs(batch) == ((), {"input_ids": x})
        assert task.targets(batch) is y
    assert task.targets((x, y.int())).dtype == torch.int64
    assert task.valid((x, y)).tolist() == [True, True]
    assert Classification(3, ignore_index=1).valid((x, y)).tolist() == [True, False]


def test_outputs():
    task, logits = Classification(3), torch.randn(2, 3)
    for raw in (logits, SequenceClassifierOutput(logits=logits), {"logits": logits}):
        assert task.output(raw) is logits


def test_a_step_as_documented():
    torch.manual_seed(0)
    task, model = Classification(3), nn.Linear(4, 3)
    metrics = task.metrics("train/")
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    args, kwargs = task.inputs(batch)
    output = task.output(model(*args, **kwargs))
    task.loss(output, batch).backward()
    metrics.update(output, task.targets(batch))
    assert model.weight.grad.abs().sum() > 0
    assert metrics.compute()["train/nll"].item() == pytest.approx(task.loss(output, batch).item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "classes=1: give at least 2"),
        ({"classes": 3, "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"classes": 3, "label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classification(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2), "the batch is a Tensor"),
        ((torch.zeros(2),), "the batch is a tuple"),
        ({"x": torch.zeros(2)}, "a mapping of x"),
        ({"labels": [1, 2]}, "without a tensor of labels"),
        ((torch.zeros(2), torch.zeros(2)), "labels are torch.float32"),
        ((torch.zeros(2), torch.zeros(2) > 0), "labels are torch.bool"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    task = Classification(3)
    for read in (task.inputs, task.targets, task.valid):
        with pytest.raises(ValueError, match=message):
            read(batch)


@pytest.mark.parametrize(("logits", "labels"), [((2, 4), (2,)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3, 5), (2, 5))])
def test_wrong_shapes_are_named(logits, labels):
    with pytest.raises(ValueError, match=r"logits are \[.*expected \[.*classes=3"):
        Classification(3).loss(torch.zeros(logits), (None, torch.zeros(labels, dtype=torch.int64)))


@pytest.mark.parametrize("raw", [BaseModelOutput(last_hidden_state=torch.zeros(1)), (torch.zeros(1),), {}, None])
def test_wrong_outputs_are_named(raw):
    with pytest.raises(ValueError, match=f"{type(raw).__name__} without logits"):
        Classification(3).output(raw)


def test_a_task_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Task()
    assert all(getattr(vars(Task)[name], "__isabstractmethod__", False) for name in vars(Task) if name[0] != "_")


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
