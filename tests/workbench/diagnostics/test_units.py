import math
from typing import Any

import pytest
import torch
import transformers as hf
from scipy.stats import norm
from torch import Tensor, nn

from tests.helpers.ranks import on_ranks
from workbench.diagnostics import dead_units, gate_statistics
from workbench.models.activations import gate, make, names

X = torch.linspace(-1, 1, 24).reshape(8, 3)


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
        "fused": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Dead units


def biased(activation: nn.Module) -> nn.Sequential:
    """Pre-activations x in three units, and x - 20 and x + 20 in one more each."""
    layer = nn.Linear(3, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5)[:, :3] + torch.eye(5)[:, 3:].sum(1, keepdim=True) * torch.eye(3)[0])
        layer.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -20.0, 20.0]))
    return nn.Sequential(layer, activation)


@pytest.mark.parametrize(
    ("name", "dead", "zero"), [("relu", 1, 1), ("gelu", 1, 1), ("silu", 1, 0), ("elu", 1, 0), ("tanh", 2, 0)]
)
def test_smooth_and_piecewise_activations_by_one_definition(name: str, dead: int, zero: int) -> None:
    """SiLU(-20) is -4e-8, which is dead and not zero; GELU(-20) is zero in fp32; tanh dies at both ends."""
    assert dead_units(biased(make(name)), [X]) == {"1": {"dead": dead, "zero": zero, "units": 5}}


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.5, 3.0])
def test_counts_are_those_of_the_definition(tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 9), nn.GELU(), nn.Linear(9, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-2, 1, 6))
    batches = [torch.randn(3, 2, 4, 4) for _ in range(4)]
    outputs = {"1": model[:2](torch.cat(batches)), "4": model[:5](torch.cat(batches))}
    expected = {}
    for site, output in outputs.items():
        units = [output[:, unit].flatten().tolist() for unit in range(output.shape[1])]
        scale = math.sqrt(sum(value * value for unit in units for value in unit) / sum(map(len, units)))
        expected[site] = {
            "dead": sum(max(unit) - min(unit) <= tolerance * scale for unit in units),
            "zero": sum(not any(unit) for unit in units),
            "units": len(units),
        }
    assert dead_units(model, [(batch, None) for batch in batches], tolerance=tolerance) == expected


class Shared(nn.Module):
    """One activation in three places: channels of images, then features, then, as an RNN does, twice in the same."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.fc, self.cell = nn.Conv1d(1, 4, 2), nn.Linear(8, 6), nn.Linear(6, 6)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc(self.act(self.conv(x[:, None])).flatten(1)))
        return self.act(self.cell(self.act(self.cell(x))))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_behind_several_layers_is_a_site_behind_each(inplace: bool) -> None:
    found = dead_units(Shared(inplace), [X])
    assert {site: row["units"] for site, row in found.items()} == {"act(conv)": 4, "act(fc)": 6, "act(cell)": 6}


def bert() -> Any:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=5, max_position_embeddings=4))


def test_transformers_are_seen_and_padding_is_not() -> None:
    """Behind the padding stands what would wake a unit up that is dead on all tokens."""
    model = bert()
    inner = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        inner.bias[0] = -50
    torch.manual_seed(1)
    embeddings, mask = torch.randn(3, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    # Attention is masked by the model itself, so what stands at padding stays there.
    inner.register_forward_hook(lambda module, args, output: output + 100 * (1 - mask)[..., None])
    batch = {"inputs_embeds": embeddings, "attention_mask": mask, "labels": torch.zeros(3, dtype=torch.long)}
    found = dead_units(model, [batch])
    site = "bert.encoder.layer.0.intermediate.intermediate_act_fn"
    assert found[site]["units"] == 6
    assert found[site]["dead"] == 1
    del batch["attention_mask"]
    assert dead_units(model, [batch])[site]["dead"] == 0


def test_the_fused_encoder_of_torch_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
    before = everything(layer)
    assert dead_units(layer, [torch.randn(2, 3, 8)])["activation"]["units"] == 16
    before["random"] = torch.get_rng_state()
    assert_same(before, everything(layer))


def test_a_network_without_activation_modules_has_no_sites() -> None:
    assert dead_units(nn.Linear(3, 2), [X]) == gate_statistics(nn.Linear(3, 2), [X]) == {}


class Lengths(nn.Module):
    """Its last axis is a length, and no units."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(1, 1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x[..., None])[..., 0])


def test_sites_without_a_number_of_units_are_left_out() -> None:
    assert dead_units(Lengths(), [torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 3)]) == {}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        dead_units(biased(nn.ReLU()), [])
    with pytest.raises(ValueError, match="'1' was seen at one position"):
        dead_units(biased(nn.ReLU()), [X[:1]])
    with pytest.raises(ValueError, match="tolerance is -1"):
        dead_units(biased(nn.ReLU()), [X], tolerance=-1)


def noisy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.SiLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("look", [dead_units, gate_statistics])
def test_the_network_is_as_it_was_also_after_an_exception(look: Any) -> None:
    model = noisy()
    model[1].eval()
    before = everything(model)
    look(model, [X])
    assert_same(before, everything(model))

    def fails(network: nn.Module, batch: Tensor) -> None:
        network(batch)
        torch.rand(1)
        raise KeyError("no")

    with pytest.raises(KeyError):
        look(model, [X], fails)
    assert_same(before, everything(model))


# Gates


@pytest.mark.parametrize("name", [name for name in names() if name != "identity"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 2.0)])
def test_gates_of_gaussian_inputs_are_those_in_closed_form(name: str, mean: float, std: float) -> None:
    z = torch.tensor(norm.ppf((torch.arange(20_000).double() + 0.5) / 20_000) * std + mean)
    layer = nn.Linear(1, 1).double()
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(0)
    found = gate_statistics(nn.Sequential(layer, make(name)), [z[:, None]])["1"]
    assert found["kind"] == name
    assert (found["mean"], found["std"]) == pytest.approx((mean, std), rel=1e-3)
    assert (found["slope"], found["slope_squared"]) == pytest.approx(gate(name, mean, std), abs=1e-3)


@pytest.mark.parametrize("act", [nn.ELU(alpha=0.7, inplace=True), nn.SiLU(inplace=True), nn.Softplus(beta=3)])
def test_slopes_are_those_of_the_module_as_it_is(act: nn.Module) -> None:
    z = X.flatten().double()
    fresh = type(act)(
        **({"beta": 3} if isinstance(act, nn.Softplus) else {"alpha": 0.7} if isinstance(act, nn.ELU) else {})
    )
    expected = [(float(fresh(x + 1e-6) - fresh(x - 1e-6))) / 2e-6 for x in z]
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        layer.bias.zero_()
    found = gate_statistics(nn.Sequential(layer, act), [X[:3].double(), X[3:].double()])["1"]
    assert found["slope"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert found["slope_squared"] == pytest.approx(sum(x * x for x in expected) / len(expected), abs=1e-6)


# Several ranks


def looked_at(model: nn.Module, shown: list[Tensor]) -> Any:
    torch.distributed.init_process_group("gloo")
    mine = shown[:1] if torch.distributed.get_rank() == 0 else shown[1:]
    return dead_units(model, mine), gate_statistics(model, mine)


def test_what_all_ranks_saw_is_put_together() -> None:
    """A unit is alive that is constant on each rank, but not the same on both."""
    model = biased(nn.ReLU())
    shown = [torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.tensor([[2.0, 0.0, 0.0]] * 2)]
    alone = dead_units(model, shown), gate_statistics(model, shown)
    assert alone[0]["1"]["dead"] == 3
    for units, gates in on_ranks(looked_at, model, shown):
        assert units == alone[0]
        assert gates["1"].pop("kind") == "relu"
        assert gates["1"] == pytest.approx({name: value for name, value in alone[1]["1"].items() if name != "kind"})
