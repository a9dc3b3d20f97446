import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.task_training import trained
from workbench.tasks import MultiLabel, OutputType

NAN = float("nan")


def test_monitor_is_one_of_the_metrics():
    assert MultiLabel(3).monitor == ("f1", "max")
    assert set(MultiLabel(3).metrics()) == {"f1", "f1_macro", "average_precision", "accuracy", "nll"}
    assert MultiLabel(3).outputs == OutputType("labels")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_loss_is_that_of_torch(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.randint(2, (5, 3)).to(dtype)
    batch = {"x": logits, "labels": labels}
    task = MultiLabel(3, pos_weight=[1.0, 2.0, 0.5])
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(task.loss(task.output({"logits": logits}), batch), expected)
    assert task.inputs(batch) == ((), {"x": logits})
    assert task.valid(batch).all()


def test_labels_at_axis_1():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(2, (2, 3, 4, 5))
    task, last = MultiLabel(3, [1.0, 2.0, 0.5], label_dim=1), MultiLabel(3, [1.0, 2.0, 0.5])
    moved = logits.movedim(1, -1), labels.movedim(1, -1)
    torch.testing.assert_close(task.loss(logits, (None, labels)), last.loss(moved[0], (None, moved[1])))
    values = [each.metrics() for each in (task, last)]
    for metrics, pair in zip(values, ((logits, labels), moved)):
        metrics.update(*pair)
    for name, value in values[0].compute().items():
        torch.testing.assert_close(value, values[1].compute()[name])


def test_missing_labels_count_nowhere():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2), torch.randint(2, (6, 2)).float()
    labels[0, 0] = labels[3, 1] = NAN
    known = ~labels.isnan()
    expected = F.binary_cross_entropy_with_logits(logits[known], labels[known])
    torch.testing.assert_close(MultiLabel(2).loss(logits, (None, labels)), expected)
    marked = MultiLabel(2, ignore_index=-1)
    torch.testing.assert_close(marked.loss(logits, (None, labels.nan_to_num(-1).long())), expected)
    assert torch.equal(MultiLabel(2).valid((None, labels)), known)
    metrics = MultiLabel(2).metrics()
    metrics.update(logits, labels)
    assert metrics.compute()["nll"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 0}, "labels=0: give at least 1"),
        ({"labels": 2, "label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"labels": 2, "label_dim": 2}, "label_dim=2: give -1 or 1"),
        ({"labels": 3, "pos_weight": [1.0, 1.0]}, "2 numbers for labels=3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiLabel(**arguments)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.zeros(4, 2), torch.zeros(4, dtype=torch.complex64)])
def test_wrong_labels_are_named(labels):
    with pytest.raises(ValueError, match=r"labels are .*: give"):
        MultiLabel(3).inputs((torch.zeros(4), labels))


def test_a_training():
    torch.manual_seed(0)
    x = torch.randn(24, 5)
    y = (x[:, :3] > 0).long()
    y[3, 1] = -1
    task, network = MultiLabel(3, ignore_index=-1), nn.Linear(5, 3)
    before = task.loss(network(x), (None, y)).item()
    logged = trained(task, network, x, y, max_epochs=30)
    assert logged["val/loss"] == pytest.approx(task.loss(network(x), (None, y)).item()) == logged["val/nll"]
    assert logged["val/loss"] < before / 1.5
    assert logged["val/average_precision"] > 0.8
