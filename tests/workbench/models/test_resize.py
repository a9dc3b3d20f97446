"""Layers of other sizes than their constructor makes: noted, checked, built again."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workbench import load, save
from workbench.checkpoints import compact
from workbench.models import MLP, ResNet
from workbench.models.architecture import build, describe, is_architecture
from workbench.models.resize import (
    ResizeError,
    axes,
    is_channelwise,
    is_resized,
    resize,
    set_resized,
    sizes,
    sync_sizes,
)

LAYERS = [
    (nn.Linear(6, 8), {"out_features": 3, "in_features": 2}, (3, 2)),
    (nn.Linear(6, 8, bias=False), {"out_features": 3, "new_bias": 1}, (3, 6)),
    (nn.Conv1d(6, 8, 3), {"in_channels": 4}, (8, 4, 3)),
    (nn.Conv2d(6, 8, (3, 5)), {"out_channels": 5}, (5, 6, 3, 5)),
    (nn.Conv2d(6, 6, 3, groups=6), {"out_channels": 4, "in_channels": 4, "groups": 4}, (4, 1, 3, 3)),
    (nn.ConvTranspose2d(6, 8, 3), {"in_channels": 4, "out_channels": 2}, (4, 2, 3, 3)),
    (nn.BatchNorm2d(6), {"num_features": 4}, (4,)),
    (nn.GroupNorm(3, 6), {"num_channels": 4, "num_groups": 2}, (4,)),
    (nn.PReLU(6), {"num_parameters": 4}, (4,)),
]


@pytest.mark.parametrize(("layer", "wanted", "shape"), LAYERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_gets_tensors_of_its_new_sizes(layer: nn.Module, wanted: dict, shape: tuple, device: str) -> None:
    model = copy.deepcopy(nn.Sequential(layer)).to(device)
    resize(model, {"0": wanted})
    made = model[0]
    assert made.weight.shape == shape
    assert {**sizes(made), "new_bias": 1} | wanted == {**sizes(made), "new_bias": 1}
    outputs = next(size for name, size in sizes(made).items() if "in_" not in name)
    assert getattr(made, "bias", None) is None or made.bias.shape == (outputs,)
    assert all(b.shape in ((), (outputs,)) for b in made.buffers())
    assert all(tensor.device.type == device for tensor in model.state_dict().values())
    assert model.resized == {"0": wanted}
    if device == "cpu":
        inputs = torch.randn(2, sizes(made).get("in_features", sizes(made).get("in_channels", outputs)), 7, 7)
        inputs = inputs[..., 0] if isinstance(made, nn.Conv1d) else inputs
        made.eval()(inputs[..., 0, 0] if isinstance(made, nn.Linear) else inputs)


@pytest.mark.parametrize(("layer", "wanted", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_attributes_follow_tensors(layer: nn.Module, wanted: dict, shape: tuple) -> None:
    """A layer with its weight replaced says what `resize` would have said."""
    layer = copy.deepcopy(layer)
    expected = copy.deepcopy(nn.Sequential(layer))
    resize(expected, {"0": wanted})
    layer.weight = nn.Parameter(torch.zeros(shape))
    sync_sizes(layer)
    assert sizes(layer) == sizes(expected[0])


def test_a_norm_without_weights_goes_by_its_statistics() -> None:
    norm = nn.BatchNorm1d(6, affine=False)
    norm.running_mean = torch.zeros(4)
    sync_sizes(norm)
    assert sizes(norm) == {"num_features": 4}


def test_heads_are_counts_of_any_module() -> None:
    attention = nn.Module()
    attention.num_heads, attention.split_size, attention.scale = 4, 32, 0.5
    model = nn.ModuleDict({"attention": attention})
    assert sizes(attention) == {"num_heads": 4, "split_size": 32}
    resize(model, {"attention": {"num_heads": 3, "split_size": 24}})
    assert (attention.num_heads, attention.split_size) == (3, 24)


def test_axes_and_channelwise_layers() -> None:
    from transformers.pytorch_utils import Conv1D

    assert axes(nn.Linear(2, 3)) == axes(nn.Conv2d(2, 3, 1)) == (0, 1)
    assert axes(Conv1D(3, 2)) == axes(nn.ConvTranspose1d(2, 3, 1)) == (1, 0)
    assert axes(nn.LayerNorm(3)) is None
    assert axes(nn.BatchNorm1d(3)) is None
    assert is_channelwise(nn.Conv2d(4, 4, 3, groups=4))
    assert not is_channelwise(nn.Conv2d(4, 4, 3, groups=2))
    assert not is_channelwise(nn.Conv2d(1, 1, 3))
    assert is_channelwise(nn.PReLU(3))
    assert not is_channelwise(nn.PReLU())


@pytest.mark.parametrize(
    ("resized", "said"),
    [
        ({"layers.9": {"out_features": 3}}, "no module 'layers.9'"),
        ({"layers.0": {"width": 3}}, "no size 'width': it has out_features, in_features"),
        ({"layers.0": {"new_bias": 1}}, "no size 'new_bias'"),
        ({"layers.0": {"out_features": 101}}, "out_features of layers.0 is 101: give 1 to 100"),
        ({"layers.0": {"out_features": 0}}, "resized is"),
        ({"layers.0": {"out_features": True}}, "resized is"),
        ({"layers.0": {"out_features": 2**40}}, "resized is"),
        ({"layers.0": 3}, "resized is"),
        ([], "resized is"),
    ],
)
def test_bad_sizes_are_refused(resized: object, said: str) -> None:
    with pytest.raises(ResizeError, match=said):
        resize(MLP(64, (100,)), resized)  # type: ignore[arg-type]


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ResizeError, match="not divided by 3 groups"):
        resize(nn.Sequential(nn.GroupNorm(3, 6)), {"0": {"num_channels": 4}})


class Derived(nn.Module):
    num_heads = property(lambda self: 4)


def test_what_cannot_be_resized_alone_is_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for model, wanted, said in (
        (tied, {"out_features": 3}, "0 shares its weights with another module"),
        (nn.Sequential(Derived()), {"num_heads": 2}, "num_heads of 0 .Derived. cannot be set"),
        (nn.Sequential(nn.MultiheadAttention(16, 4)), {"num_heads": 2}, "has no size 'num_heads': it has none"),
    ):
        with pytest.raises(ResizeError, match=said):
            resize(model, {"0": wanted})


def resized_mlp() -> MLP:
    model = MLP(6, (8, 8), 3)
    sized = {"layers.0": {"out_features": 5}, "layers.2": {"in_features": 5}}
    resize(model, sized)
    nn.init.normal_(model.layers[0].weight)
    nn.init.normal_(model.layers[2].weight)
    return model


def test_a_checkpoint_of_other_sizes_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = resized_mlp().eval()
    mask = torch.rand(8, 5) < 0.5
    with torch.no_grad():
        model.layers[2].weight *= mask
    save(model, tmp_path, {"layers.2.weight": mask})
    loaded = load(tmp_path)
    assert loaded.resized == model.resized
    assert describe(loaded) == describe(model)
    assert torch.equal(compact.masks(tmp_path)["layers.2.weight"], mask)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    inputs = torch.randn(4, 6)
    assert torch.equal(loaded(inputs), model(inputs))
    again = copy.deepcopy(loaded)
    assert describe(again) == describe(model)


def test_a_network_of_its_own_sizes_notes_nothing() -> None:
    model = resized_mlp()
    set_resized(model, {})
    assert "resized" not in (describe(model) or {})
    set_resized(model, {})


def test_a_file_that_would_take_much_memory_to_shrink_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """A constructor of terabytes, resized to what the file holds: refused on the way, without memory."""
    small = MLP(4, (4,), 4)
    sized = {"layers.0": {"out_features": 4, "in_features": 4}, "layers.2": {"in_features": 4}}
    asked = {"in_features": 2**30, "hidden": [2**20], "classes": 4}
    found = {"class_path": "workbench.models.mlp.MLP", "init_args": asked, "resized": sized}
    assert is_architecture(found)
    save(small, tmp_path, architecture=found)
    with pytest.raises(ValueError, match=r"weights as built and \d+ resized"):
        load(tmp_path)


def test_sizes_in_a_file_are_checked_where_they_are_read(tmp_path: Path) -> None:
    for bad in ({"layers.0": {"out_features": -1}}, {"layers.0": {"out_features": "4"}}, [1], "x"):
        assert not is_resized(bad)
        assert not is_architecture({"class_path": "a.B", "init_args": {}, "resized": bad})
    found = {**(describe(MLP(4, (4,), 2)) or {}), "resized": {"layers.7": {"out_features": 1}}}
    with pytest.raises(ResizeError, match=f"{tmp_path}: MLP has no module 'layers.7'"):
        build(found, tmp_path)


def test_resized_layers_within_a_wrapped_network(tmp_path: Path) -> None:
    """What a nested architecture notes is applied to the module that it is of."""
    from workbench.models.architecture import _argument_from_json, argument_to_json

    inner = resized_mlp()
    made = _argument_from_json(json.loads(json.dumps(argument_to_json(inner))), tmp_path)
    assert sizes(made.layers[0]) == {"out_features": 5, "in_features": 6}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnet_with_fewer_channels(tmp_path: Path, norm: str) -> None:
    model = ResNet(8, 8, norm=norm)
    numbers = {"num_features": 4} if norm == "batch" else {"num_channels": 4, "num_groups": 4}
    sized = {
        "stages.0.0.conv1": {"out_channels": 4},
        "stages.0.0.norm1": numbers,
        "stages.0.0.conv2": {"in_channels": 4},
    }
    resize(model, sized)
    model.eval()
    save(model, tmp_path)
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(tmp_path)(inputs), model(inputs))
    stored = load_file(next(tmp_path.glob("*.safetensors")))
    assert stored["dense/stages.0.0.conv1.weight"].shape == (4, 8, 3, 3)
