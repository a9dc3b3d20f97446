import pytest
import torch
from torch import nn

from prune.masks.memory import all_finite, finite_on_ranks, shared_memory


def test_neighbours_in_one_buffer_are_not_shared():
    model = nn.Module()
    buffer = torch.zeros(10)
    model.a, model.b = nn.Parameter(buffer[1:4]), nn.Parameter(buffer[4:])
    model.empty, model.other = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    assert [[n for n, _ in g] for g in shared_memory(model)] == [["a"], ["b"], ["empty"], ["other"]]
    model.whole = nn.Parameter(buffer)
    assert [[n for n, _ in g] for g in shared_memory(model)] == [["a", "b", "whole"], ["empty"], ["other"]]


def test_on_the_meta_device_only_the_same_object_is_shared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.append(model[0])
    groups = [[n for n, _ in g] for g in shared_memory(model)]
    assert groups == [["0.weight", "2.weight"], ["0.bias", "2.bias"], ["1.weight"], ["1.bias"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(bad: float, dtype: torch.dtype) -> None:
    values = torch.randn(5000).to(dtype)
    assert all_finite([torch.ones(3, dtype=dtype), values, torch.zeros(0)])
    values[4321] = bad
    for found in (all_finite, finite_on_ranks):
        assert not found([torch.ones(3, dtype=dtype), values])
        assert found([])
