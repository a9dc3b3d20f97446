"""Networks whose weights are not all in Linear and Conv layers: what a density means for them."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from prune import Masks, Pruner, shrink
from prune.policies import Fixed, Gradual
from prune.tickets.sections.hunt import hunts_of, sparsest
from prune.tickets.sections.hunt import levels as hunt_levels
from tests.setups.base import Setup
from workbench import load, save
from workbench.records import read_run, write
from workbench.report.summary import gather
from workbench.report.tables import main


class Sequence(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self, layer: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.rnn = layer(12, 24, num_layers=2, batch_first=True, **arguments)
        self.head = nn.Linear(48 if arguments.get("bidirectional") else 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Cross(nn.Module):
    """Queries of 12, keys of 8 and values of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, kdim=8, vdim=4, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x[..., :8], x[..., 8:])[0].mean(1))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Bilinear(12, 12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.score(x[:, 0], x[:, 1])))


def dense_layers(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(72, 32)), nn.ReLU(), norm(nn.Linear(32, 3)))


def convolutions(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        norm(nn.Conv1d(6, 16, 3)), nn.ReLU(), norm(nn.Conv1d(16, 16, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )


def upsampling() -> nn.Module:
    layers = [nn.ConvTranspose1d(6, 16, 4, stride=2), nn.ReLU(), nn.ConvTranspose1d(16, 8, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 28, 3))


def multiplied(model: nn.Module, name: str) -> Tensor:
    """What is multiplied by, of a masked parameter: by torch's own names of parametrized weights."""
    path, _, last = name.rpartition(".")
    if ".parametrizations." in f".{path}":
        owner, _, weight = path.partition("parametrizations.")
        return getattr(model.get_submodule(owner.rstrip(".")), weight)
    weight = {"weight_v": "weight", "weight_orig": "weight"}.get(last, last)
    return getattr(model.get_submodule(path), weight)


def is_served(make: Callable[[], nn.Module], share: float) -> Callable[[], None]:
    """A density of .1, asked for in a loop of one's own: it is that of all matrices, while and after training.

    ``share`` is the most that the whole model may keep: what is left is biases and scales of norms.
    """

    def check() -> None:
        torch.manual_seed(0)
        model, x, y = make(), torch.randn(16, 6, 12), torch.randint(3, (16,))
        policy = Gradual(0.1, "1it", "3it", "1it")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with policy.follow(model, optimizer):
            for _ in range(6):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                assert loss.isfinite()
                loss.backward()
                optimizer.step()
        masks = policy.masks
        assert masks is not None
        assert abs(masks.density - 0.1) < 0.002, masks
        nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        assert nonzero / total <= masks.model_density(model) < share
        model.eval()
        expected = model(x)
        assert expected.isfinite().all()
        for name, mask in masks.items():
            assert not multiplied(model, name).detach()[~mask].any(), name
        _survives(make, model, masks, x, expected)

    def quietly() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # weight_norm of old says that it is
            warnings.filterwarnings("ignore", "layer collapse|.* does not record its constructor's arguments")
            check()

    return quietly


def _survives(make: Callable[[], nn.Module], model: nn.Module, masks: Masks, x: Tensor, expected: Tensor) -> None:
    """The compact checkpoint gives the same network."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, masks)
        again = load(folder, make())
    assert torch.equal(again(x), expected)


def mixtral() -> None:
    """Asked for .1: embeddings, norms and routers beside a tenth of the rest."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = hf.MixtralForCausalLM(config)
    ids = torch.randint(64, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    policy = Gradual(0.1, "0it", "2it", "1it", pruner=Pruner(exclude="*.mlp.gate.weight"))
    with policy.follow(model, optimizer):
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    masks = policy.masks
    assert masks is not None
    experts = [mask for name, mask in masks.items() if "experts" in name]
    assert len(experts) == 4
    assert {mask.dim() for mask in experts} == {3}
    assert masks.is_applied_to(model)
    assert masks.model_density(model) < 0.16  # .835 where experts stay dense
    rows = Pruner(structure="balanced", allocation="uniform", exclude="*.mlp.gate.weight")(model, 0.5)
    kept = rows["model.layers.0.mlp.experts.down_proj"]
    assert set(kept.sum(-1).flatten().tolist()) == {24}, "every output of every expert keeps half of its 48 inputs"
    erk = Pruner(allocation="erk", exclude="*.mlp.gate.weight")(model, 0.1).layer_densities()
    ratio = erk["model.layers.0.mlp.experts.down_proj"] / erk["model.layers.0.self_attn.q_proj.weight"]
    expected = ((32 + 48) / (32 * 48)) / ((32 + 32) / (32 * 32))  # of one expert against a query's matrix
    assert abs(ratio - expected) < 0.02


class Mixer(nn.Module):
    """A layer of one's own, with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(30, 30))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixing


def own_layer() -> None:
    model = nn.Sequential(Mixer(), nn.Linear(30, 10, bias=False))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        policy = Gradual(0.1, "1it", "2it", "1it")
        with policy.follow(model, torch.optim.SGD(model.parameters(), lr=0.1)):
            before = [str(each.message) for each in said]
    assert len(before) == 1, "before the first update, once"
    assert "75.0% of the parameters of this Sequential are matrices that stay dense: '0.mixing' (75.0%)" in before[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(exclude="0.*")(model, 0.1)
    assert "cannot be pruned: '0.mixing' is of Mixer" in _refusal(lambda: Pruner(include="0.*")(model, 0.1))


def headline() -> None:
    """80 of 1,280 masked weights, of 1,493 parameters: 6.25 % of the weights, and 19.6 % of the model."""

    def level(number: int, kept: int) -> dict[str, Any]:
        size = {
            "parameters": 1493,
            "prunable": 1280,
            "kept": kept,
            "dense_fp32_bytes": 5972,
            "checkpoint_bytes": 4 * kept,
        }
        return {"level": number, "metrics": {"val/accuracy": 0.9, "test/accuracy": 0.9}, "size": size}

    levels = [level(0, 1280), level(1, 80)]
    record = {"stage": "ticket", "job": "hunt", "status": "finished", "monitor": ["accuracy", "max"], "levels": levels}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "ticket", {**record, "metrics": levels[1]["metrics"], "size": levels[1]["size"]})
        stages = read_run(Path(folder))
    found = gather(stages)
    (hunt,) = hunts_of(stages, found)
    assert "level 1, 19.6% of the model, density 6.25%" in sparsest(hunt)
    for table in (main(found), main(found, brief=True), hunt_levels(hunt)):
        (column, of_pruned) = (table.headers.index(name) for name in ("model density", "density"))
        assert column < of_pruned
        assert (table.lines[-1].cells[column].text, table.lines[-1].cells[of_pruned].text) == ("19.6%", "6.25%")
    model = nn.Sequential(nn.Embedding(30, 10), nn.Linear(10, 10, bias=False))
    policy = Fixed(Pruner()(model, 0.1))
    policy.follow(model, torch.optim.SGD(model.parameters(), lr=0.1)).remove()
    logged = policy.densities()
    assert (logged["density"], logged["model_density"]) == (0.1, (300 + 10) / 400)


def segformer() -> None:
    """Its feed-forward net has a depthwise convolution between its two layers."""
    torch.manual_seed(0)
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    )
    model, image = hf.SegformerModel(config).eval(), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* not covered by FFN")
        masks = Pruner(structure="ffn", allocation="uniform")(model, 0.5)
    small = shrink(model, image, masks)
    assert [len(rows) for rows in small.removed.values()] == [8, 16]
    assert small.model.stages[1].blocks[0].mlp.dwconv.dwconv.weight.shape == (16, 1, 3, 3)
    masks.apply(model)
    torch.testing.assert_close(small.model(image).last_hidden_state, model(image).last_hidden_state)


def _refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    raise AssertionError("it is not refused")


def old(norm: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: norm(layer)


SETUPS = [
    Setup("density", "LSTM", is_served(lambda: Sequence(nn.LSTM), 0.16)),
    Setup("density", "GRU", is_served(lambda: Sequence(nn.GRU, bidirectional=True), 0.16)),
    Setup("density", "RNN", is_served(lambda: Sequence(nn.RNN), 0.17)),
    Setup("density", "weight_norm of old", is_served(lambda: dense_layers(old(weight_norm)), 0.14)),
    Setup(
        "density",
        "weight_norm as a parametrization",
        is_served(lambda: dense_layers(parametrizations.weight_norm), 0.14),
    ),
    Setup("density", "spectral_norm of old", is_served(lambda: convolutions(spectral_norm), 0.13)),
    Setup(
        "density",
        "spectral_norm as a parametrization",
        is_served(lambda: convolutions(parametrizations.spectral_norm), 0.13),
    ),
    Setup("density", "fused experts of Mixtral", mixtral),
    Setup("density", "TransformerEncoder", is_served(Encoder, 0.24)),
    Setup("density", "MultiheadAttention with unlike widths", is_served(Cross, 0.24)),
    Setup("density", "transposed convolutions", is_served(upsampling, 0.14)),
    Setup("density", "a bilinear layer", is_served(Pairs, 0.12)),
    Setup("density", "matrices of a layer of one's own stay dense", own_layer),
    Setup("density", "the page's headline is the model's density", headline),
    Setup("feed-forward units", "Segformer", segformer),
]
