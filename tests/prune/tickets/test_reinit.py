"""New initial weights: those of a fresh construction, or of every part's own rule; nothing else is touched."""

import random
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn

from prune.masks import Masks
from prune.shrinking import shrink
from prune.tickets.reinit import reinitialised
from workbench.models import MLP, LeNet5, ResNet
from workbench.models.activations import swap_activation
from workbench.models.hub import from_config

BERT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


def bert() -> nn.Module:
    return from_config("BertForSequenceClassification", {**BERT, "max_position_embeddings": 16})


def masked_language_model() -> nn.Module:
    return from_config("BertForMaskedLM", {**BERT, "max_position_embeddings": 16})


MAKERS = {
    "MLP": lambda: MLP(8, [6, 5], 3, norm="batch"),
    "LeNet5": lambda: LeNet5(image_size=8),
    "ResNet": lambda: ResNet(8, 4),
    "ResNet without a norm": lambda: ResNet(8, 4, norm="none"),
    "BERT": bert,
    "tied BERT": masked_language_model,
}


def trained(network: nn.Module) -> nn.Module:
    """Every parameter and every statistic moved."""
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) + 0.1)
    return network


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_those_of_a_fresh_construction(name: str) -> None:
    given = trained(MAKERS[name]())
    before = {key: value.clone() for key, value in given.state_dict().items()}
    found = reinitialised(given, 7)
    torch.manual_seed(7)
    expected = MAKERS[name]().state_dict()
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(given.state_dict()[key], value) for key, value in before.items()), "left as it was"
    assert not all(torch.equal(found[key], value) for key, value in reinitialised(given, 8).items())
    given.load_state_dict(found)


def test_random_state_is_left_alone() -> None:
    network = MLP(4, [3], 2)
    before = torch.get_rng_state(), random.getstate()
    reinitialised(network, 1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_another_activation_has_the_same_noise_up_to_its_gain() -> None:
    one, other = (reinitialised(MLP(8, [6, 5], 3, activation), 5) for activation in ("gelu", "relu"))
    for name, value in one.items():
        if name.endswith("weight"):
            torch.testing.assert_close(value / value.norm(), other[name] / other[name].norm())


def test_a_swapped_activation_is_no_obstacle() -> None:
    network = swap_activation(bert(), "relu")
    torch.manual_seed(2)
    expected = bert().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in reinitialised(network, 2).items())


class Plain(nn.Module):
    """Says nothing of how it was built."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.mixer = nn.MultiheadAttention(width, 2)
        self.recurrent = nn.LSTM(width, width)
        self.again = nn.Linear(width, width)
        self.head = nn.Linear(width, width)
        self.head.weight = self.again.weight
        self.register_buffer("scale", torch.full((3,), 2.0))


def test_every_part_draws_by_its_own_rule() -> None:
    given = Plain(4)
    scale = given.scale.clone()
    trained(given)
    found = reinitialised(given, 3)
    assert torch.equal(found["layers.1.running_mean"], torch.zeros(4))
    assert torch.equal(found["layers.1.weight"], torch.ones(4))
    assert torch.equal(found["head.weight"], found["again.weight"]), "tied"
    assert torch.equal(found["mixer.out_proj.bias"], torch.zeros(4)), "the outer module's rule comes after the inner's"
    assert torch.equal(found["scale"], given.scale)
    assert not torch.equal(found["scale"], scale), "a buffer that nothing resets is taken for a constant"
    bounds = {"layers.0.weight": 1 / 3, "recurrent.weight_hh_l0": 0.5, "again.weight": 0.5}
    for name, bound in bounds.items():
        assert bound / 3 < found[name].abs().max() <= bound, name
        assert not torch.equal(found[name], reinitialised(given, 4)[name])


def test_what_nothing_draws_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(width))
            self.layer = nn.Linear(width, width)

    with pytest.raises(ValueError, match=r"drawn for token of Bare: let it keep .* self\.init_args, or give .* reset_"):
        reinitialised(Bare(3), 1)
    frozen = Bare(3)
    frozen.token.requires_grad_(False)
    assert torch.equal(reinitialised(frozen, 1)["token"], frozen.token)


class Ruled(nn.Module):
    """The convention of transformers, in a module of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.token = nn.Linear(width, width), nn.Parameter(torch.randn(width))
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
        if isinstance(module, Ruled):
            nn.init.normal_(module.token)


def test_a_rule_for_all_submodules_is_applied() -> None:
    given = Ruled(3)
    found = reinitialised(given, 1)
    assert (found["layer.weight"] == 0.25).all()
    assert not torch.equal(found["token"], given.token)


class Loading(nn.Module):
    """A constructor that loads trained weights: new ones are not to be had from it."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.arange(16.0).view(4, 4))


def test_weights_that_a_constructor_loads_are_drawn_anew() -> None:
    found = reinitialised(Loading(), 1)
    assert 0.1 < found["body.weight"].abs().max() <= 0.5


def test_a_module_of_transformers_inside_a_silent_one_is_built_again() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Linear(2, 2)

    torch.manual_seed(1)
    expected = bert().state_dict()
    found = reinitialised(Around(trained(bert())), 1)
    assert all(torch.equal(found[f"inner.{name}"], value) for name, value in expected.items())


def test_transformers_draws_again_what_it_has_loaded(tmp_path: Any) -> None:
    """It marks what it has loaded, so as not to draw it; without the configuration only its rule is left."""
    bert().save_pretrained(tmp_path)
    given = type(bert()).from_pretrained(tmp_path)
    given.classifier = nn.Linear(16, 5)
    found = reinitialised(given, 1)
    for name in ("bert.encoder.layer.0.output.dense.weight", "classifier.weight"):
        assert 0.01 < found[name].std() < 0.03
        assert not torch.equal(found[name], given.state_dict()[name])


def test_frozen_parts_stay() -> None:
    given = trained(MLP(8, [6, 6], 3, norm="batch"))
    for parameter in (*given.layers[0].parameters(), *given.layers[1].parameters()):
        parameter.requires_grad_(False)
    before, found = {name: value.clone() for name, value in given.state_dict().items()}, reinitialised(given, 1)
    kept = {name for name, value in before.items() if torch.equal(found[name], value)}
    assert kept == {name for name in before if name.startswith(("layers.0.", "layers.1."))} | {
        "layers.4.num_batches_tracked"
    }
    given.layers[0].weight.data.zero_()
    assert torch.equal(found["layers.0.weight"], before["layers.0.weight"]), "a copy"


def test_types_are_those_of_the_network() -> None:
    found = reinitialised(MLP(8, [6], 3).double(), 1)
    assert all(value.dtype == torch.float64 for value in found.values())


def shrunken(network: nn.Module, layer: str, size: int, inputs: Tensor) -> nn.Module:
    """Without the first half of a layer's outputs."""
    mask = torch.ones_like(network.get_parameter(f"{layer}.weight"), dtype=torch.bool)
    mask[:size] = False
    with torch.no_grad():
        network.get_parameter(f"{layer}.weight")[:size] = 0
        network.get_parameter(f"{layer}.bias")[:size] = 0
    made = shrink(network, inputs, Masks({f"{layer}.weight": mask})).model
    assert getattr(made, "resized", None)
    return made


def test_a_shrunk_network_keeps_its_sizes_and_the_scale_of_its_rule() -> None:
    network = shrunken(MLP(64, [200, 10], 10, "relu"), "layers.0", 150, torch.randn(3, 64))
    found = reinitialised(network, 3)
    torch.manual_seed(3)
    whole = MLP(64, [200, 10], 10, "relu").state_dict()
    assert found["layers.2.weight"].shape == (10, 50)
    assert torch.equal(found["layers.0.weight"], whole["layers.0.weight"][:50])
    torch.testing.assert_close(found["layers.2.weight"], whole["layers.2.weight"][:, :50] * 2)
    network.load_state_dict(found)


def test_a_module_that_is_its_own_network() -> None:
    class Own(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

    found = reinitialised(trained(Own()), 1)
    torch.manual_seed(1)
    assert torch.equal(found["layer.weight"], nn.Linear(3, 2).weight)
