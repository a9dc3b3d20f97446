import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune.pruner import Pruner, prunable
from tests.helpers.prunable_models import SCOPE, Small, mlp, quiet

# Scope


def test_scope_is_the_matrices_of_layers():
    """Pitfall 6: never norms, biases, embeddings."""
    assert list(prunable(Small())) == SCOPE
    masks = quiet(Pruner(), Small(), 0.5)
    assert list(masks) == SCOPE


def test_conv1d_of_transformers_is_known_by_name():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    assert list(prunable(nn.Sequential(Conv1D(), nn.LayerNorm(4)))) == ["0.weight"]


@pytest.mark.parametrize("copied", [False, True], ids=["same-object", "same-memory"])
def test_a_decoder_tied_to_its_embedding_is_left_alone(copied: bool):
    """Pitfall 6, in both ways of tying."""
    model = Small()
    model.decoder.weight = nn.Parameter(model.embed.weight.data) if copied else model.embed.weight
    assert list(prunable(model)) == SCOPE[:-1]
    assert "decoder.weight" not in quiet(Pruner(), model, 0.5)


@pytest.mark.parametrize("copied", [False, True], ids=["same-object", "same-memory"])
def test_a_weight_shared_by_layers_is_pruned_once(copied: bool):
    model = mlp(5, 5, 5, 5)
    model[2].weight = nn.Parameter(model[0].weight.data) if copied else model[0].weight
    masks = Pruner()(model, 0.5)
    assert list(masks) == ["0.weight", "1.weight"]
    assert masks.density == 25 / 50
    assert list(prunable(model, include="2.weight")) == ["0.weight"]
    assert list(prunable(model, exclude="2.weight")) == ["1.weight"]


def test_a_layer_used_twice_is_pruned_once():
    layer = nn.Linear(4, 4)
    assert list(prunable(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]


def test_weights_that_share_only_part_of_their_memory():
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.data[:3])
    with pytest.raises(ValueError, match=r"\['0.weight', '1.weight'\] share only part"):
        Pruner()(model, 0.5)
    assert list(prunable(model, exclude="1.weight")) == ["2.weight"]


def test_include_and_exclude():
    model = Small()
    assert list(prunable(model, include="body.*")) == ["body.in.weight", "body.out.weight"]
    assert list(prunable(model, include=["up.*", "conv.weight"])) == ["conv.weight", "up.weight"]
    assert list(prunable(model, include="*", exclude=["decoder*", "*.bias"])) == SCOPE[:-1]
    masks = quiet(Pruner(include="body.*", exclude="*.out.*"), model, 0.5)
    assert masks.counts() == {"body.in.weight": (24, 48)}


def test_scope_by_type_and_size():
    model = Small()
    assert list(prunable(model, include=nn.Linear)) == ["body.in.weight", "body.out.weight", "decoder.weight"]
    assert list(prunable(model, include=[nn.Conv2d, "up.*"], exclude=nn.Embedding)) == ["conv.weight", "up.weight"]
    assert list(prunable(model, exclude=[nn.Linear, "up.*"])) == ["conv.weight", "bilinear.weight"]
    assert list(prunable(model, smallest=48)) == ["conv.weight", "body.in.weight", "decoder.weight"]
    assert list(quiet(Pruner(include=nn.Linear, smallest=49), model, 0.5)) == ["decoder.weight"]
    with pytest.raises(ValueError, match=r"include pattern <class .*Conv3d'> matches none of the 6 names"):
        prunable(model, include=nn.Conv3d)
    with pytest.raises(ValueError, match="smallest is 1000, but all 6 weights have fewer entries"):
        prunable(model, smallest=1000)


def test_a_pattern_that_matches_nothing_is_refused():
    """Pitfall 6."""
    with pytest.raises(ValueError, match=r"include pattern 'decodre.weight' .*did you mean 'decoder.weight'"):
        Pruner(include=["body.*", "decodre.weight"])(Small(), 0.5)
    with pytest.raises(ValueError, match=r"exclude pattern 'Embed.*' .*did you mean 'embed.weight'"):
        Pruner(exclude="Embed.*")(Small(), 0.5)
    with pytest.raises(
        ValueError, match=r"include pattern 'norm.weight' .* cannot be pruned: 'norm.weight' is of Batch"
    ):
        Pruner(include="norm.weight")(Small(), 0.5)
    with pytest.raises(ValueError, match=r"output pattern 'head.*'"):
        Pruner(allocation="layerwise", output="head.*")(Small(), 0.5)
    with pytest.raises(ValueError, match="leave no weight to prune"):
        Pruner(include="body.*", exclude="body.*")(Small(), 0.5)
    with pytest.raises(ValueError, match="no matrix of a layer that is known"):
        Pruner()(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)), 0.5)
    with pytest.raises(ValueError, match="leave no weight to prune"):
        prunable(Small(), include=[])


def test_output_layer_is_the_last_or_the_one_named():
    """Pitfall 6: the output layer has its own rate."""
    model = mlp(10, 10, 10, 10)
    assert [k for k, _ in Pruner(allocation="layerwise")(model, 0.8).counts().values()] == [80, 80, 90]
    first = Pruner(allocation="layerwise", output="0.*")(model, 0.8)
    assert [k for k, _ in first.counts().values()] == [90, 80, 80]


def test_a_tied_or_excluded_output_leaves_no_other_layer_in_its_place():
    """The last layer of the body is no output."""
    model = nn.Sequential(nn.Embedding(10, 10), *mlp(10, 10, 10, 10))
    inner = Pruner(allocation="layerwise", exclude=f"{len(model) - 1}.*")(model, 0.8)
    assert [k for k, _ in inner.counts().values()] == [80, 80]
    model[-1].weight = model[0].weight
    assert [k for k, _ in Pruner(allocation="layerwise")(model, 0.8).counts().values()] == [80, 80]


# Weights that cannot be ranked


def test_nan_and_infinite_weights_are_refused_by_name():
    for bad in (math.nan, math.inf, -math.inf):
        model = mlp(3, 3, 3)
        model[1].weight.data[0, 0] = bad
        with pytest.raises(ValueError, match=r"'1\.weight' has 1 NaN or infinite values of 9"):
            Pruner("random")(model, 0.5)


def replaced(weight: Tensor) -> nn.Module:
    model = mlp(4, 4)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def test_weights_without_plain_values_are_refused():
    cases = [
        (mlp(4, 4).to("meta"), "'0.weight' is on the meta device"),
        (replaced(torch.eye(4).to_sparse()), r"'0.weight' is stored as torch.sparse_coo"),
        (replaced(torch.ones(4, 4, dtype=torch.int8)), r"'0.weight' is of type torch.int8"),
        (replaced(torch.ones(4, 4, dtype=torch.complex64)), "torch.complex64"),
        (nn.Sequential(nn.LazyLinear(3)), "'0.weight' is a UninitializedParameter"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            Pruner()(model, 0.5)
