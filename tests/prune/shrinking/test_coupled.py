"""Channels tied by the network, as a structure."""

import pytest

from prune.pruner import Pruner
from prune.schedule import kept
from prune.shrinking import Coupled, shrink
from tests.helpers.shrinkable_models import assert_same, built, tiny_transformer, weights


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize(
    ("criterion", "allocation"),
    [("magnitude", "global"), ("random", "uniform"), ("snip", "erk"), ("taylor", "erdos_renyi")],
)
def test_coupled_goes_with_every_criterion_and_allocation(criterion: str, allocation: str) -> None:
    model, inputs = built("resnet")
    pruner = Pruner(criterion, Coupled(inputs), allocation)
    data = {"loader": [inputs], "loss": lambda net, batch: net(batch).square().mean()}
    given = data if criterion in ("snip", "taylor") else {}
    masks = pruner(model, 0.5, **given)  # type: ignore[arg-type]
    again = pruner(model, 0.25, within=masks, **given)  # type: ignore[arg-type]
    assert again.is_subset(masks)
    units = Coupled(inputs).layout(model, weights(model)).units
    result = shrink(model, inputs, again)
    left = Coupled(inputs).layout(result.model, weights(result.model)).units
    assert sum(left.values()) == kept(sum(units.values()), 0.25)
    assert_same(result, model, again, inputs)


def test_inputs_of_coupled_as_a_recipe_writes_them() -> None:
    model, inputs = built("mlp")
    written = Coupled([3, 12]).layout(model, weights(model))
    assert written.units == Coupled(inputs).layout(model, weights(model)).units == {"layers.0": 20, "layers.2": 20}
    bert, tokens = tiny_transformer("bert")
    lists = {name: value.tolist() for name, value in tokens.items()}
    assert Coupled(lists).layout(bert, weights(bert)).units == Coupled(tokens).layout(bert, weights(bert)).units


def test_layers_read_side_by_side_are_one_key() -> None:
    model, inputs = built("dense")
    layout = Coupled(inputs).layout(model, weights(model))
    assert layout.units == {"one": 10, "both": 6}
    first = layout.members["two.weight"]
    assert [(key, index.flatten().tolist()) for key, index in first if index is not None] == [
        ("one", [6, 7, 8, 9]),
        ("one", [0, 1, 2, 3, 4, 5]),
    ]
    only = Coupled(inputs).layout(model, {"two.weight": model.two.weight})
    assert only.units == {"one": 6, "two": 4}, "nothing reads them side by side here"


def test_wrong_inputs_of_coupled() -> None:
    model, _ = built("mlp")
    with pytest.raises(ValueError, match=r"MLP cannot be called with example_inputs .*give what it is called with"):
        Coupled([3, 13]).layout(model, weights(model))
    with pytest.raises(ValueError, match="without a tensor"):
        Coupled("x").layout(model, weights(model))
