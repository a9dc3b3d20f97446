import hashlib

import pytest
import torch

from tests.helpers.images import loaded
from workbench.data import Shapes
from workbench.data.shapes import draw
from workbench.tasks import Segmentation


def test_sizes_and_types():
    data = Shapes(batch_size=8, size=20, train=12, val=5, test=6)
    assert [len(loaded(data, part)[1]) for part in ("train", "val", "test")] == [12, 5, 6]
    x, y = next(iter(data.val_dataloader()))
    assert (x.shape, x.dtype) == ((5, 1, 20, 20), torch.float32)
    assert (y.shape, y.dtype) == ((5, 20, 20), torch.int64)
    assert data.input_shape == (1, 20, 20)
    assert isinstance(data.task, Segmentation)
    assert data.task.classes == len(data.names) == 4


def test_the_images_never_change():
    """Records of old runs are comparable only as long as this holds."""
    labels = draw(5, 24, 1)[1]
    assert hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16] == "842c4f2eaa4dc598"
    assert torch.equal(draw(3, 24, 1)[0], draw(5, 24, 1)[0][:3])


def test_parts_have_different_images_with_every_class():
    torch.manual_seed(1)
    data = Shapes(train=30, val=30, test=30)
    labels = {part: loaded(data, part)[1] for part in ("train", "val", "test")}
    assert not torch.equal(labels["val"], labels["test"])
    for part in labels.values():
        assert part.unique().tolist() == [0, 1, 2, 3]
    x = loaded(data, "train")[0]
    assert abs(float(x.mean())) < 0.3
    assert 0.7 < float(x.std()) < 1.3


@pytest.mark.parametrize("arguments", [{"size": 15}, {"train": 0}, {"test": 0}, {"batch_size": 0}])
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        Shapes(**arguments)
