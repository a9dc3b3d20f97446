import torch
from torch import nn

from prune.masks.memory import shared_memory


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
