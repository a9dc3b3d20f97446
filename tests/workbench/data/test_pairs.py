import pytest
import torch

from tests.helpers.images import loaded
from workbench.data import DigitPairs, Digits
from workbench.tasks import Binary, MultiLabel


def test_sizes_and_types():
    data = DigitPairs(batch_size=50)
    assert [len(loaded(data, part)[1]) for part in ("train", "val", "test")] == [2514, 360, 720]
    x, y = next(iter(data.val_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((50, 128), torch.float32, (50, 10), torch.int64)
    assert data.input_shape == (128,)
    assert isinstance(data.task, MultiLabel)
    assert data.task.labels == 10
    larger = DigitPairs("larger", image=True)
    assert isinstance(larger.task, Binary)
    x, y = next(iter(larger.val_dataloader()))
    assert (x.shape, y.shape, larger.input_shape) == ((64, 1, 8, 16), (64,), (1, 8, 16))


@pytest.mark.parametrize("part", ["val", "test"])
def test_labels_are_those_of_the_two_digits(part):
    digits, classes = loaded(Digits(image=True), part)
    x, y = loaded(DigitPairs(image=True), part)
    larger = loaded(DigitPairs("larger"), part)[1]
    x = (x - x.min()) / (x.max() - x.min())
    digits = (digits - digits.min()) / (digits.max() - digits.min())
    assert torch.allclose(x[: len(digits), ..., :8], digits, atol=1e-5), "each digit is on the left"
    right = torch.cdist(x[: len(digits), ..., 8:].flatten(1), digits.flatten(1)).argmin(1)
    assert not torch.equal(right, torch.arange(len(digits)))
    for row, left, other, more in zip(y, classes.tolist(), classes[right].tolist(), larger):
        assert row.nonzero().flatten().tolist() == sorted({left, other})
        assert more == (left > other)


def test_pairs_are_the_same_in_every_run():
    torch.manual_seed(1)
    one = loaded(DigitPairs(), "test")
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, loaded(DigitPairs(), "test")))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="target='sum': choose from digits, larger"):
        DigitPairs("sum")
    with pytest.raises(ValueError, match="batch_size=0"):
        DigitPairs(batch_size=0)
