import math

import pytest
import torch
from torch import nn

from prune.masks import Masks
from prune.pruner import Pruner, prunable
from prune.structures import Channel, Layout
from prune.structures.layout import whole


def test_a_weight_in_two_units_needs_both() -> None:
    """The outputs of one layer are the inputs of the next."""
    layout = Layout(
        {"a": (3, 2), "b": (2, 3)},
        {
            "a": [("middle", torch.arange(3)[:, None])],
            "b": [("middle", torch.arange(3)[None]), ("b", torch.arange(2)[:, None])],
        },
    )
    assert layout.units == {"middle": 3, "b": 2}
    scores = {"a": torch.tensor([[1.0, 3], [5, 7], [0, 0]]), "b": torch.tensor([[2.0, 4, 6], [8, 10, 12]])}
    units = layout.pool(scores)
    assert units["middle"].tolist() == [14 / 4, 26 / 4, 18 / 4]
    assert units["b"].tolist() == [4, 10]
    masks = layout.spread({"middle": torch.tensor([True, False, True]), "b": torch.tensor([False, True])})
    assert masks["a"].tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert masks["b"].tolist() == [[False] * 3, [True, False, True]]
    assert {key: flags.tolist() for key, flags in (layout.unpruned(masks) or {}).items()} == {
        "middle": [True, False, True],
        "b": [False, True],
    }


def test_pruned_weights_count_as_nothing_in_a_unit() -> None:
    layer = nn.Linear(2, 3, bias=False)
    within = Masks({"weight": torch.tensor([[True, False], [True, True], [False, False]])})
    layout = Channel().layout(layer, prunable(layer))
    scores = {"weight": torch.tensor([[4.0, math.nan], [1, 2], [math.inf, -math.inf]])}
    assert layout.pool(scores, within)["weight"].tolist() == [2.0, 1.5, 0.0]
    kept = Pruner(structure="channel")(layer, 1 / 3, within, scores=scores)
    assert kept["weight"].tolist() == [[True, False], [False] * 2, [False] * 2]
    with pytest.raises(ValueError, match="only 2 left"):
        Pruner(structure="channel")(layer, 0.9, within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_is_pooled_in_double(dtype: torch.dtype) -> None:
    layer = nn.Linear(300, 5).to(dtype)
    pooled = Channel().layout(layer, prunable(layer)).pool({"weight": layer.weight.detach()})["weight"]
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, layer.weight.detach().double().mean(1))


def test_layouts_that_make_no_sense() -> None:
    rows = torch.arange(3)[:, None]
    with pytest.raises(ValueError, match="give both of all"):
        Layout({"a": (3, 2)}, {"b": [("b", rows)]})
    with pytest.raises(ValueError, match="give both of all"):
        Layout({}, {})
    with pytest.raises(ValueError, match=r"units of 'a' in 'a' have shape \(3, 1\), the weight \(4, 2\)"):
        Layout({"a": (4, 2)}, {"a": [("a", rows)]})
    with pytest.raises(ValueError, match=r"units \[1, 3\] of 'a' have no weights"):
        Layout({"a": (3, 2)}, {"a": [("a", rows * 2)]})


def test_whole_leaves_plain_tensors_alone() -> None:
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
