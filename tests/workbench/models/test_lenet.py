import pytest
import torch
from torch import nn

from workbench.models import LeNet5


@pytest.mark.parametrize("size", range(8, 41))
def test_lenet_fits_every_size(size):
    model = LeNet5(image_size=size)
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_lenet_is_smooth_but_for_its_activation():
    assert not [m for m in LeNet5().modules() if isinstance(m, nn.MaxPool2d)]
