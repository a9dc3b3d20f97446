import hashlib
import json

import pytest
import torch

from tests.helpers.images import loaded
from workbench.data import Digits
from workbench.data.digits import digits
from workbench.data.images import SPLIT_SEED, stratified_split


def test_digits_sizes_and_types():
    module = Digits(batch_size=50)
    sizes = [len(loaded(module, part)[1]) for part in ("train", "val", "test")]
    assert sizes == [1257, 180, 360]
    x, y = next(iter(module.val_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((50, 64), torch.float32, (50,), torch.int64)
    assert (module.classes, module.input_shape) == (10, (64,))


def test_digits_as_images_are_the_same_digits():
    flat, image = Digits(), Digits(image=True)
    x, y = loaded(image, "test")
    assert x.shape == (360, *image.input_shape) == (360, 1, 8, 8)
    assert torch.equal(x.flatten(1), loaded(flat, "test")[0])
    assert torch.equal(y, loaded(flat, "test")[1])


def test_digits_split_never_changes():
    """Records of old runs are comparable only as long as this holds."""
    parts = stratified_split(digits()[1].numpy(), [180, 360], SPLIT_SEED)
    text = json.dumps([part.tolist() for part in parts])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3cbbb18a331b56d9"


def test_digits_split_is_stratified_and_free_of_the_seed():
    torch.manual_seed(1)
    one = {part: loaded(Digits(), part) for part in ("val", "test")}
    torch.manual_seed(2)
    two = {part: loaded(Digits(), part) for part in ("val", "test")}
    assert all(torch.equal(a, b) for part in one for a, b in zip(one[part], two[part]))
    assert one["test"][1].bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert one["val"][1].bincount().tolist() == pytest.approx([18] * 10, abs=1)


def test_digits_are_standardised_on_the_training_part():
    x = {part: loaded(Digits(), part)[0].double() for part in ("train", "val", "test")}
    assert float(x["train"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(x["train"].square().mean()) == pytest.approx(1, abs=1e-5)
    assert abs(float(x["test"].mean())) > 1e-4
    grey, low = digits()[0], float(x["train"].min())
    steps = (torch.cat(list(x.values())) - low) / ((float(x["train"].max()) - low) / 16)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert torch.equal(steps.round().long().flatten().bincount(), grey.long().flatten().bincount())
