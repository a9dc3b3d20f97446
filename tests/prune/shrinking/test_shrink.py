"""Networks made smaller: equal outputs, exactly the units that a naive search finds, and nothing else touched."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune.shrinking import Coupled, shrink
from tests.helpers.shrinkable_models import NETWORKS, assert_same, built, coupled, masked, sparse, weights
from workbench import load, save
from workbench.checkpoints import compact
from workbench.models import MLP

# Every family


@pytest.mark.filterwarnings("ignore:shrink took nothing")
@pytest.mark.parametrize(
    ("name", "density"), [*((name, 0.02) for name in NETWORKS), ("mlp", 0.2), ("resnet_group", 0.2), ("mobile", 0.2)]
)
def test_outputs_stay_at_any_density(name: str, density: float) -> None:
    model, inputs = built(name)
    state = copy.deepcopy(model.state_dict())
    masks = sparse(model, density)
    result = shrink(model, inputs, masks)
    assert_same(result, model, masks, inputs)
    assert result.masks is not None
    assert result.masks.is_applied_to(result.model)
    if density == 0.02:
        assert result.after < result.before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert type(result.model) is type(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_coupled_channels_go_and_leave_what_was_asked_for(name: str, tmp_path: Path) -> None:
    """All that `Coupled` prunes is physically gone: every key is as wide as its units were to be many."""
    model, inputs = built(name)
    masks = coupled(model, inputs)
    result = shrink(model, inputs, masks)
    assert_same(result, model, masks, inputs)
    assert result.masks is not None
    left = Coupled(inputs).layout(result.model, weights(result.model))
    first = Coupled(inputs).layout(model, weights(model))
    assert sorted(left.units.values()) == sorted(max(1, round(0.5 * n)) for n in first.units.values())
    assert result.masks.density == 1.0
    if hasattr(model, "init_args"):
        result.model.eval()
        save(result.model, tmp_path, result.masks)
        loaded = load(tmp_path)
        assert torch.equal(loaded(inputs), result.model(inputs))
        assert compact.masks(tmp_path).keys() == result.masks.keys()


def test_removed_rows_are_numbered_as_they_were() -> None:
    """Every row that is left is the row of the first network that was not removed, over all rounds."""
    model, inputs = built("mlp")
    result = shrink(model, inputs, masks := sparse(model, 0.1))
    before = masked(model, masks)
    assert set(result.removed) == {"layers.0", "layers.2"}
    columns = [True] * 12
    for layer in ("layers.0", "layers.2", "layers.4"):
        rows = [i not in result.removed.get(layer, ()) for i in range(len(before.get_submodule(layer).weight))]
        expected = before.get_submodule(layer).weight[rows][:, columns]
        assert torch.equal(result.model.get_submodule(layer).weight, expected)
        columns = rows


def naive_widths(model: MLP) -> list[int]:
    """How wide the hidden layers of an MLP are when one dead unit after the other is taken out, weights as lists.

    A layer's last unit stays, but of zeros.
    """
    layers = [layer.weight.tolist() for layer in model.layers if isinstance(layer, nn.Linear)]
    again = True
    while again:
        again = False
        for one, two in pairwise(layers):
            for unit in range(len(one)):
                silent = not any(one[unit])
                unheard = not any(row[unit] for row in two)
                if silent and unheard and len(one) == 1:
                    continue
                if silent or unheard:
                    one[unit] = [0.0] * len(one[unit])
                    for row in two:
                        row[unit] = 0.0
                    if len(one) > 1:
                        del one[unit]
                        for row in two:
                            del row[unit]
                    again = True
                    break
    return [len(layer) for layer in layers[:-1]]


@pytest.mark.filterwarnings("ignore:shrink took nothing")
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 0.5))
def test_what_goes_is_what_a_naive_search_finds(seed: int, density: float) -> None:
    torch.manual_seed(seed)
    model = MLP(6, (8, 7, 8), 3)
    masks = sparse(model, density, seed)
    result = shrink(model, torch.randn(3, 6), masks)
    widths = [len(layer.weight) for layer in result.model.layers if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert widths[:-1] == naive_widths(masked(model, masks))
    assert shrink(result.model, torch.randn(3, 6), result.masks).after == result.after


@pytest.mark.parametrize("dead", [2, 4])
def test_a_layer_of_dead_units_beside_others_becomes_one_unit_or_less(dead: int) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.both = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(F.relu(torch.cat([self.one(x), self.two(x)], -1)))

    model, inputs = Beside(), torch.randn(4, 6)
    with torch.no_grad():
        model.both.weight[:, 4 : 4 + dead] = 0
    result = shrink(model, inputs)
    assert result.removed == {"two": (0, 1) if dead == 2 else (1, 2, 3)}
    torch.testing.assert_close(result.model(inputs), model(inputs))


# What stays


def test_a_constant_is_not_folded_through_a_border() -> None:
    """A convolution padded with zeros sees less of a constant at the border; unpadded or circular ones do not."""
    for padding, mode, bias, width in (
        (1, "zeros", 0.5, 4),
        (1, "zeros", 0.0, 3),
        (0, "zeros", 0.5, 3),
        (1, "circular", 0.5, 3),
        ("same", "zeros", 0.5, 4),
        ("valid", "zeros", 0.5, 3),
    ):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=padding, padding_mode=mode, bias=False)
        )
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = bias
        inputs = torch.randn(2, 2, 8, 8)
        result = shrink(model, inputs)
        assert result.model[0].out_channels == result.model[2].in_channels == width
        torch.testing.assert_close(result.model(inputs), model(inputs))
        assert (result.model[2].bias is None) == (width == 4 or bias == 0)


def test_a_unit_that_only_seems_constant_stays() -> None:
    """A gate that is shut for every example may open for another: that its factor is constant is not enough."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.gate(x)) * self.value(x))

    model = Gated()
    with torch.no_grad():
        model.gate.bias.fill_(-1e3)
        model.value.weight[0] = 0
        model.value.bias[0] = 1.0
        model.value.weight[1] = 0
        model.value.bias[1] = 0.0
    result = shrink(model, torch.randn(4, 3))
    assert result.removed == {"gate": (1,), "value": (1,)}
    opened = torch.randn(4, 3) * 1e4
    torch.testing.assert_close(result.model(opened), model(opened))


class Joined(nn.Module):
    """A hidden layer whose way to the next one something else may join."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate = kind, nn.Linear(6, 1)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = F.gelu(self.one(x))
        if self.kind == "mask":
            return self.two(hidden * mask[..., None])
        if self.kind == "filled":
            return self.two(hidden.masked_fill(mask[..., None] == 0, 0))
        if self.kind == "sum":
            return self.two(hidden.sum(1))
        if self.kind == "threshold":
            return self.two(hidden * (x[..., :1] > -4))
        if self.kind == "written":
            hidden[:, :1][mask[:, :1] == 0] = 7.0
            return self.two(hidden)
        if self.kind == "gate":
            return self.two(hidden * F.hardsigmoid(self.gate(x)))
        return self.two(F.dropout(hidden.tanh() * 2 + 1, 0.5, self.training).transpose(1, 2).mean(-1))


@pytest.mark.parametrize("kind", ["mask", "filled", "sum", "threshold", "written", "gate", "none"])
def test_a_constant_stays_where_something_else_joins_on_the_way(kind: str) -> None:
    """Also if it changes nothing for the example: another mask, another length, another range may come."""
    model = Joined(kind).eval()
    with torch.no_grad():
        model.gate.bias.fill_(30)
        model.one.weight[:3] = 0
        model.one.bias[:3] = 2
    inputs = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.long)
    result = shrink(model, inputs)
    assert result.removed == ({"one": (0, 1, 2)} if kind == "none" else {})
    others = torch.randn(2, 9, 6) * 100, torch.randint(0, 2, (2, 9))
    torch.testing.assert_close(result.model(*others), model(*others))


def test_a_border_in_the_middle_keeps_its_constants() -> None:
    """A depthwise convolution that pads makes of a constant what an average over another size shows."""
    for bias, padding, gone in ((1.0, 1, {}), (1.0, 0, {"0": (1,)}), (0.0, 1, {})):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 3, padding=padding, groups=4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = bias
        result = shrink(model, torch.randn(2, 2, 8, 8))
        assert result.removed == gone
        inputs = torch.randn(2, 2, 5, 5)
        torch.testing.assert_close(result.model(inputs), model(inputs))


def test_a_depthwise_filter_of_zeros_makes_its_channel_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 1)
    ).eval()
    with torch.no_grad():
        model[2].weight[2] = 0
        model[3].bias.normal_()
    inputs = torch.randn(2, 3, 8, 8)
    result = shrink(model, inputs)
    assert result.removed == {"0": (2,)}
    assert (result.model[2].groups, result.model[3].num_features) == (3, 3)
    torch.testing.assert_close(result.model(inputs), model(inputs))


def test_what_a_layer_norm_mixes_stays() -> None:
    model = MLP(12, (20,), 5, norm="layer")
    with torch.no_grad():
        model.layers[-1].weight[:, :10] = 0  # type: ignore[union-attr, operator, index]
        model.layers[0].weight[:5] = 0  # type: ignore[union-attr, operator, index]
    assert shrink(model, torch.randn(3, 12)).after == sum(p.numel() for p in model.parameters())


def test_of_a_group_norm_only_whole_groups_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model[3].weight[:, [0, 1, 2, 5]] = 0
    inputs = torch.randn(2, 3, 4, 4)
    result = shrink(model, inputs)
    assert result.removed == {"0": (0, 1)}
    assert (result.model[1].num_groups, result.model[1].num_channels) == (3, 6)
    torch.testing.assert_close(result.model(inputs), model(inputs))


class Odd(nn.Module):
    """A hidden layer that something else looks at, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6)) if kind == "scale" else None
        if kind == "tied":
            self.two.weight = self.one.weight
        if kind == "grouped":
            self.one, self.two = nn.Conv1d(6, 6, 1, groups=2), nn.Conv1d(6, 6, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        if self.kind == "grouped":
            return self.two(F.relu(self.one(x[..., None]))).flatten(1)
        hidden = F.relu(self.one(x))
        if self.kind == "returned":
            return {"hidden": hidden, "logits": self.two(hidden)}
        if self.kind == "softmax":
            return self.two(hidden.softmax(-1))
        if self.kind == "sum":
            return self.two(hidden) + hidden.sum(-1, keepdim=True)
        if self.kind == "view":
            return self.two(hidden.view(len(x), 2, 3).flip(1).reshape(len(x), 6))
        if self.kind == "twice":
            return self.two(F.relu(self.one(hidden)))
        if self.kind == "recurrent":
            return self.two(F.relu(self.two(hidden)))
        if self.kind == "added":
            return self.two(hidden) + x
        return self.two(hidden if self.scale is None else hidden * self.scale)


@pytest.mark.parametrize(
    "kind", ["returned", "softmax", "sum", "view", "twice", "recurrent", "scale", "tied", "grouped"]
)
def test_what_something_else_looks_at_stays(kind: str) -> None:
    model = Odd(kind)
    with torch.no_grad():
        model.two.weight[:, :3] = 0
        model.one.weight[3] = 0
    inputs = torch.randn(4, 6)
    result = shrink(model, inputs)
    assert result.after == result.before
    assert result.removed == {}
    assert result.difference == 0
    with pytest.raises(ValueError, match="no channel of Odd"):
        Coupled(inputs).layout(model, weights(model))


def test_inputs_and_outputs_are_never_narrowed() -> None:
    model = Odd("added")
    with torch.no_grad():
        model.one.weight.zero_()
        model.two.weight.zero_()
    result = shrink(model, inputs := torch.randn(4, 6))
    assert (result.model.one.in_features, result.model.two.out_features) == (6, 6)  # type: ignore[union-attr]
    assert result.model.one.out_features == 1, "one unit always stays, the first"  # type: ignore[union-attr]
    assert result.removed == {"one": (1, 2, 3, 4, 5)}
    torch.testing.assert_close(result.model(inputs), model(inputs))


# Modes, types, devices of thought


def test_modes_gradients_types_and_random_state_are_kept() -> None:
    model, inputs = built("vgg")
    model.train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    model.double()
    state = torch.get_rng_state()
    result = shrink(model, inputs.double(), masks := sparse(model, 0.02))
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in result.model.named_modules()}
    for name, parameter in result.model.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.requires_grad == (name != "features.0.weight")
        assert parameter.is_leaf
    assert result.difference < 1e-12
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in result.model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    loss = result.model(inputs.double()).square().mean()
    loss.backward()
    assert masks.density > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = MLP(12, (20, 20), 5).to(dtype)
    result = shrink(model, torch.randn(3, 12, dtype=dtype), sparse(model, 0.05))
    assert result.after < result.before
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_zeros_without_masks_count_and_masks_are_applied() -> None:
    model, inputs = built("mlp")
    masks = sparse(model, 0.1)
    with_masks, without = shrink(model, inputs, masks), shrink(masked(model, masks), inputs)
    assert without.masks is None
    assert with_masks.after == without.after
    for name, tensor in with_masks.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name])


def test_it_trains_on_under_its_masks() -> None:
    model, inputs = built("mlp")
    result = shrink(model, inputs, sparse(model, 0.1))
    assert result.masks is not None
    optimizer = torch.optim.AdamW(result.model.parameters(), 0.1)
    with result.masks.keep(optimizer, result.model):
        for _ in range(2):
            result.model(inputs).square().sum().backward()
            optimizer.step()
    assert result.masks.is_applied_to(result.model)


def test_positional_and_keyword_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, left: Tensor, right: Tensor, power: int = 1) -> Tensor:
            return self.head((self.left(left) + self.right(right)).tanh() ** power)

    model = Two()
    with torch.no_grad():
        model.head.weight[:, 2] = 0
    left, right = torch.randn(2, 3), torch.randn(2, 4)
    for inputs in ((left, right), [left, right], {"left": left, "right": right, "power": 2}):
        assert shrink(model, inputs).removed == {"left": (2,), "right": (2,)}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("text", "without a tensor: give what the model is called with"),
        ({}, "dict without a tensor"),
        (torch.randn(2, 7), "cannot be called with example_inputs .RuntimeError: .*give what it is called with"),
        ({"y": torch.randn(2, 12)}, "cannot be called with example_inputs .TypeError"),
    ],
)
def test_wrong_inputs(inputs: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shrink(MLP(12, (4,), 2), inputs)


def test_wrong_masks_and_networks_without_an_answer() -> None:
    with pytest.raises(ValueError, match="name no parameter of this MLP"):
        shrink(MLP(12, (4,), 2), torch.randn(2, 12), {"x": torch.ones(2, dtype=torch.bool)})

    class Silent(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input).argmax(-1)

    with pytest.raises(ValueError, match="Silent returns no floating-point tensor"):
        shrink(Silent(3, 2), torch.randn(2, 3))

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.one(x).detach().numpy())

    result = shrink(Detached(), torch.randn(2, 3))
    assert result.before == result.after


def test_a_constant_too_large_for_its_type_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 6e4
        model[1].weight[:, 0] = 1.0
        model[1].bias.fill_(6e4)
        model[0].weight[1] = 0
        model[0].bias[1] = -6e4
        model[1].weight[:, 1] = 1.0
    assert shrink(model, torch.randn(2, 3).half()).removed == {"0": (0, 1)}, "they cancel out"
    with torch.no_grad():
        model[1].weight[:, 1] = 0.0
        model[0].weight[2] = 0
        model[0].bias[2] = 1.0
        model[1].weight[:, 2] = -6e4
    result = shrink(model, torch.randn(2, 3).half())
    assert math.isfinite(result.difference)


def test_transposed_convolutions_and_skips_to_them() -> None:
    """An hourglass: what a padded layer reads goes if it is zero, and concatenated inputs stay in their places."""

    class Hourglass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.mid = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.up, self.out = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(9, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            up = F.relu(self.up(F.relu(self.mid(F.relu(self.down(x))))))
            return self.out(torch.cat([up, x], 1))

    model = Hourglass()
    with torch.no_grad():
        model.out.weight[:, 1:3] = 0
        model.mid.weight[4:6] = 0
        model.mid.bias[4:6] = torch.tensor([-1.0, 1.0])
        model.mid.weight[:, 2] = 0
    inputs = torch.randn(2, 3, 8, 8)
    result = shrink(model, inputs)
    assert result.removed == {"down": (2,), "mid": (4,), "up": (1, 2)}
    assert (result.model.up.in_channels, result.model.up.out_channels, result.model.out.in_channels) == (7, 4, 7)
    torch.testing.assert_close(result.model(inputs), model(inputs))


def test_feed_forward_units_of_torch_s_own_transformer() -> None:
    model: Any = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    with torch.no_grad():
        model.layers[0].linear2.weight[:, :5] = 0
    inputs = torch.randn(2, 5, 8)
    result = shrink(model, inputs)
    assert result.removed == {"layers.0.linear1": (0, 1, 2, 3, 4)}
    torch.testing.assert_close(result.model(inputs), model(inputs))


def test_what_cannot_be_traced_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.lstm, self.after = nn.Linear(3, 4), nn.LSTM(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.lstm(self.before(x))[0])

    with pytest.raises(ValueError, match="Recurrent has something that its channels cannot be traced through"):
        shrink(Recurrent(), torch.randn(2, 7, 3))


class Beheld(nn.Module):
    """A hidden layer that is read by one more, in ways that are easily overlooked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two, self.aux = kind, nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = self.one(x)
        if self.kind == "index":
            return self.two(hidden), hidden.argmax(-1)
        if self.kind == "aux":
            return (self.two(hidden), self.aux(hidden)) if self.training else self.two(hidden)
        if self.kind == "dataclass":
            return Answer(self.two(hidden), hidden.sum(-1))
        coarse = 0 * self.aux(x).to(torch.bfloat16).sum().to(x)
        return self.two(hidden.softmax(-1)) + coarse


@dataclass
class Answer:
    logits: Tensor
    total: Tensor


@pytest.mark.parametrize("kind", ["index", "aux", "dataclass", "coarse"])
def test_what_is_looked_at_besides_stays(kind: str) -> None:
    model = Beheld(kind)
    with torch.no_grad():
        model.two.weight[:, :3] = 0
    result = shrink(model, inputs := torch.randn(4, 6))
    assert result.removed == {}
    result.model.train()(inputs)
    if kind == "coarse":
        assert shrink(model.bfloat16(), inputs.bfloat16()).removed == {}


def test_outputs_that_cannot_be_looked_into_are_refused() -> None:
    class Opaque(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return {"logits": super().forward(input), "rest": object()}

    with pytest.raises(ValueError, match="returns object, which cannot be compared: let it return tensors"):
        shrink(Opaque(3, 2), torch.randn(2, 3))


def test_a_masked_bias_that_takes_over_a_constant_is_masked_no_longer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 2
        model[2].weight[2, :3] = 0
    result = shrink(model, torch.randn(4, 6), {"2.bias": torch.tensor([True, False, False])})
    assert result.masks is not None
    assert result.masks["2.bias"].tolist() == [True, True, False]
    assert result.masks.is_applied_to(result.model)


def test_tensors_of_a_fixed_type_inside_are_named() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float() / 255)

    with pytest.raises(ValueError, match=r"cannot be called in float64.*fixed type inside, as by x\.float"):
        shrink(Fixed(3, 2), torch.randint(0, 256, (2, 3), dtype=torch.uint8))


def test_channels_numbered_anew_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[3].weight[:, 1] = 0
    assert shrink(model, torch.randn(2, 3, 8, 8)).removed == {}
    with pytest.raises(ValueError, match="no channel of Sequential"):
        Coupled(torch.randn(2, 3, 8, 8)).layout(model, weights(model))


def test_why_nothing_could_be_taken_out_is_said() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    single = {"0.weight": (torch.arange(6)[:, None] + torch.arange(4)) % 2 == 0}
    with pytest.warns(UserWarning, match="took nothing out of these masks, because no output and no input"):
        assert shrink(model, x, single).removed == {}
    last = {"2.weight": torch.tensor([[True] * 6, [False] * 6, [True] * 6])}
    with pytest.warns(UserWarning, match=r"because '2.weight': its units are inputs or outputs of the network"):
        shrink(model, x, last)
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 3))
    rows = {"0.parametrizations.weight.original": (torch.arange(6) > 1)[:, None].expand(6, 4)}
    with pytest.warns(UserWarning, match="under spectral_norm: remove the parametrization first"):
        shrink(normed, x, rows)


@pytest.mark.filterwarnings("ignore:shrink took nothing")
def test_a_network_is_shrunk_after_a_call_that_left_a_weight_with_a_history() -> None:
    network = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    network(torch.randn(2, 4))
    shrunk = shrink(network, torch.randn(2, 4))
    assert isinstance(network[0].weight, torch.Tensor)
    assert sum(each.numel() for each in shrunk.model.parameters()) == sum(each.numel() for each in network.parameters())
