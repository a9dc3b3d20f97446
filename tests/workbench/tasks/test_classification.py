import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.tokenization_utils_base import BatchEncoding

from workbench.tasks import Classification, Task, loss_weight


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 1, 0, -100])
    weights = [1.0, 4.0, 0.5]
    task, batch = Classification(3, smoothing, -100, weights), (None, labels)
    expected = nn.functional.cross_entropy(
        logits, labels, weight=torch.tensor(weights, dtype=torch.float64), label_smoothing=smoothing
    )
    torch.testing.assert_close(task.loss(logits, batch), expected)
    assert task.weight(batch).item() == sum(weights[y] for y in labels.tolist() if y >= 0) == loss_weight(task, batch)
    assert Classification(3, ignore_index=-100).weight(batch) == 5
    assert not task.state_dict()
    metrics = task.metrics()
    metrics.update(logits, labels)
    assert metrics.compute()["nll"].item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_only_classes_without_weight_give_a_loss_of_0():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = Classification(3, class_weights=[0.0, 1.0, 1.0]).loss(logits, (None, torch.tensor([0, 0])))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_classes_at_axis_1():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.randint(3, (2, 5))
    task, batch = Classification(3, class_dim=1), (None, labels)
    output = task.output(logits)
    assert output.shape == (2, 5, 3)
    assert task.outputs.class_dim == 1
    torch.testing.assert_close(task.loss(output, batch), nn.functional.cross_entropy(logits, labels))
    samples = torch.randn(4, 3)
    assert torch.equal(task.output(samples), samples)
