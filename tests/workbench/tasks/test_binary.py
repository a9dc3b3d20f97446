import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.helpers.task_training import trained
from workbench.tasks import Binary, OutputType

NAN = float("nan")


def test_monitor_is_one_of_the_metrics():
    assert Binary().monitor == ("accuracy", "max")
    assert set(Binary().metrics()) == {"accuracy", "f1", "auroc", "nll"}
    assert Binary().outputs == OutputType("labels")


@pytest.mark.parametrize(
    ("logits", "labels", "shape"),
    [
        ((4,), (4,), (4,)),
        ((4, 1), (4,), (4,)),
        ((4, 1), (4, 1), (4,)),
        ((4,), (4, 1), (4,)),
        ((4, 6, 1), (4, 6), (4, 6)),
        ((4, 1, 1), (4, 1), (4,)),
        ((4, 1, 5, 6), (4, 5, 6), (4, 5, 6)),
        ((4, 1, 5, 6), (4, 1, 5, 6), (4, 5, 6)),
        ((1, 1), (1,), (1,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_logits_meet_their_labels(logits, labels, shape, dtype):
    torch.manual_seed(0)
    task, raw, y = Binary(), torch.randn(logits), torch.randint(2, labels).to(dtype)
    batch = (torch.zeros(len(y)), y)
    for form in (raw, {"logits": raw}, SequenceClassifierOutput(logits=raw)):
        output = task.output(form)
        assert output.shape == task.targets(batch).shape == task.valid(batch).shape == shape
        expected = F.binary_cross_entropy_with_logits(raw.reshape(shape), y.float().reshape(shape))
        torch.testing.assert_close(task.loss(output, batch), expected)


def test_arguments_reach_the_loss_and_leave_the_metrics():
    logits, labels = torch.randn(9), torch.tensor([0, 1, 1, 0, -100, 1, 0, 0, 1])
    task, batch = Binary(pos_weight=3.0, label_smoothing=0.1, ignore_index=-100), (None, labels)
    counts = labels != -100
    smooth = 0.9 * labels[counts].float() + 0.05
    expected = F.binary_cross_entropy_with_logits(logits[counts], smooth, pos_weight=torch.tensor(3.0))
    torch.testing.assert_close(task.loss(logits, batch), expected)
    assert task.valid(batch).sum() == 8
    metrics = task.metrics("val/")
    metrics.update(logits, task.targets(batch))
    plain = F.binary_cross_entropy_with_logits(logits[counts], labels[counts].float())
    assert metrics.compute()["val/nll"].item() == pytest.approx(plain.item())
    assert metrics.compute()["val/accuracy"] == ((logits > 0) == labels.bool())[counts].float().mean()


def test_no_state_beside_the_network():
    assert not Binary(pos_weight=2.0).state_dict()


def test_a_wrong_form_is_named():
    with pytest.raises(ValueError, match=r"logits are \[4, 2\] for labels \[4\].*Classification\(2\)"):
        Binary().loss(torch.zeros(4, 2), (None, torch.zeros(4)))
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        Binary(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"pos_weight=-1\.0: give finite numbers above 0"):
        Binary(pos_weight=-1.0)
    with pytest.raises(ValueError, match=r"labels are torch\.complex64"):
        Binary().targets((None, torch.zeros(4, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="labels hold 2: give 0 and 1"):
        Binary().loss(torch.zeros(2), (None, torch.tensor([0, 2])))


def test_a_training():
    torch.manual_seed(0)
    x = torch.randn(24, 5)
    y = (x[:, 0] > 0).float()
    y[3] = NAN
    network = nn.Linear(5, 1)
    before = Binary().loss(network(x).flatten(), (None, y)).item()
    logged = trained(Binary(), network, x, y, max_epochs=20)
    output = network(x).flatten()
    assert logged["val/nll"] == pytest.approx(logged["val/loss"])
    assert logged["val/loss"] == pytest.approx(Binary().loss(output, (None, y)).item())
    assert logged["val/loss"] < before / 1.5
    assert logged["val/auroc"] > 0.9
