from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune.accounting import Account, Layer, account, latency
from prune.masks import Masks

BATCH, LENGTH = 3, 5


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4, bias=False))


def half(weight: Tensor) -> Tensor:
    """Every other weight."""
    return torch.arange(weight.numel()).view(weight.shape) % 2 == 0


def flops(found: Account) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.dense_flops, layer.sparse_flops) for layer in found.layers}


# Counts by hand


def test_an_mlp_by_hand():
    model = mlp()
    mask = torch.zeros(16, 8, dtype=torch.bool)
    mask[0, :3] = True
    found = account(model, torch.zeros(BATCH, 8), Masks({"0.weight": mask}))
    assert found.layers == (
        Layer("0.weight", (16, 8), 3, BATCH * 2 * 8 * 16),
        Layer("3.weight", (4, 16), 64, BATCH * 2 * 16 * 4),
    )
    assert flops(found)["0.weight"] == (768, BATCH * 2 * 3)
    assert found.parameters == 8 * 16 + 16 + 2 * 16 + 16 * 4
    assert (found.prunable, found.kept) == (128 + 64, 3 + 64)
    assert found.prunable_density == 67 / 192
    assert found.model_density == (16 + 32 + 67) / 240
    assert (found.dense_flops, found.sparse_flops, found.real_flops) == (768 + 384, 18 + 384, 768 + 384)
    buffers = 2 * 16 * 4 + 8  # mean, variance and an int64 of the norm
    assert found.dense_bytes == found.fp32_bytes == 240 * 4 + buffers
    assert found.packed_bytes == (240 - 128) * 4 + buffers + 128 // 8 + 3 * 4
    assert found.stored_density == found.packed_bytes / found.dense_bytes


def test_without_masks_everything_is_kept_whatever_is_zero():
    model = mlp()
    nn.init.zeros_(model[0].weight)
    found = account(model, torch.zeros(BATCH, 8))
    assert (found.prunable_density, found.model_density, found.stored_density) == (1, 1, 1)
    assert found.sparse_flops == found.dense_flops


def test_bytes_follow_the_precision():
    model = mlp().to(torch.bfloat16)
    found = account(model, torch.zeros(BATCH, 8, dtype=torch.bfloat16), Masks({"3.weight": half(model[3].weight)}))
    assert found.dense_bytes == 240 * 2 + 2 * 16 * 2 + 8
    assert found.fp32_bytes == 240 * 4 + 2 * 16 * 4 + 8
    assert found.dense_bytes - found.packed_bytes == 32 * 2 - 64 // 8


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        # 2 x positions of the output x weights, for every sample; a transposed one: positions of the input
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), (BATCH, 4, 5, 5), 2 * BATCH * 25 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (BATCH, 4, 7, 7), 2 * BATCH * 9 * 6 * 2 * 9),
        (nn.Conv1d(3, 3, 2, groups=3), (BATCH, 3, 6), 2 * BATCH * 5 * 3 * 2),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (BATCH, 4, 5, 5), 2 * BATCH * 25 * 6 * 4 * 9),
        (nn.Linear(3, 2), (BATCH, LENGTH, 3), 2 * BATCH * LENGTH * 3 * 2),
        (nn.Linear(3, 2, bias=False), (3,), 2 * 3 * 2),
    ],
)
def test_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int):
    found = account(layer, torch.zeros(shape), Masks({"weight": half(layer.weight)}))
    assert (found.dense_flops, flops(found)["weight"]) == (expected, (expected, expected // 2))


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted(kind: Any, gates: int):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(3, 5, num_layers=2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0])

    found = account(Net(), torch.zeros(LENGTH, BATCH, 3))
    assert found.dense_flops == 2 * LENGTH * BATCH * (gates * (3 * 5 + 5 * 5 + 2 * 5 * 5) + 5 * 2)
    sizes = {"ih_l0": 3 * 5, "hh_l0": 5 * 5, "ih_l1": 5 * 5, "hh_l1": 5 * 5}
    assert {name: dense for name, (dense, _) in flops(found).items()} == {
        **{f"cell.weight_{name}": 2 * LENGTH * BATCH * gates * size for name, size in sizes.items()},
        "head.weight": 2 * LENGTH * BATCH * 10,
    }


def test_an_encoder_layer_of_torch_is_counted_whole():
    """In eval mode it would run as one operator; and attention reads a weight without calling its layer."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = account(model, torch.zeros(BATCH, LENGTH, 8))
    products = {
        "self_attn.in_proj_weight": 8 * 24,
        "self_attn.out_proj.weight": 8 * 8,
        "linear1.weight": 8 * 16,
        "linear2.weight": 16 * 8,
    }
    assert flops(found) == {name: (2 * BATCH * LENGTH * size,) * 2 for name, size in products.items()}
    attention = 2 * 2 * BATCH * LENGTH * LENGTH * 8
    assert found.dense_flops == sum(dense for dense, _ in flops(found).values()) + attention
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bert_by_hand(attention: str):
    """Attention is counted by its two products, written out or fused."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=11, max_position_embeddings=6, num_labels=3, attn_implementation=attention, **sizes)
    )
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    found = account(model, {"input_ids": ids, "attention_mask": ids})
    tokens = BATCH * LENGTH
    each = 2 * tokens * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 2 * BATCH * LENGTH * LENGTH * 8
    assert found.dense_flops == 2 * each + 2 * BATCH * (8 * 8 + 8 * 3)
    assert flops(found)["bert.encoder.layer.0.attention.self.query.weight"][0] == 2 * tokens * 64
    assert flops(found)["classifier.weight"][0] == 2 * BATCH * 24
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


# Names, ties, forms


def test_a_shared_weight_is_held_once_and_works_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    found = account(model, torch.zeros(BATCH, 4), Masks({"b.weight": half(model.a.weight)}))
    assert found.layers == (Layer("a.weight", (4, 4), 8, 2 * BATCH * 32),)
    assert found.parameters == 16 + 4 + 4
    assert found.packed_bytes == 8 * 4 + 2 + 8 * 4


def test_bytes_are_those_of_a_checkpoint():
    """Buffers that are not saved do not count; memory that parameters share counts once, as much as the largest has."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2, bias=False))
    model.register_buffer("saved", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("passing", torch.zeros(50), persistent=False)
    model.register_parameter("part", nn.Parameter(model[0].weight.detach()[:2]))
    found = account(model, torch.zeros(BATCH, dtype=torch.int64))
    assert found.dense_bytes == found.packed_bytes == (24 + 8) * 4 + 3 * 8
    assert found.parameters == 24 + 8


def test_flops_are_booked_to_the_weight_whoever_multiplies_it():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            first, last = self.layer.weight[:2], self.layer.weight[2:]
            return nn.functional.linear(x, last) @ last @ (first.T @ first)

    found = account(Parts(), torch.zeros(BATCH, 4))
    assert flops(found)["layer.weight"][0] == 2 * (BATCH * 4 * 4 + BATCH * 4 * 4 + 4 * 2 * 4)
    assert found.dense_flops == flops(found)["layer.weight"][0] + 2 * BATCH * 4 * 4


def test_a_mask_of_what_is_not_pruned_by_itself_counts_too():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    found = account(model, torch.zeros(BATCH, dtype=torch.int64), Masks({"0.weight": half(model[0].weight)}))
    assert [(layer.name, layer.kept, layer.total) for layer in found.layers] == [
        ("0.weight", 12, 24),
        ("1.weight", 8, 8),
    ]
    assert flops(found)["0.weight"] == (0, 0)  # a look-up multiplies nothing


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor | int = 0) -> Tensor:
        return self.layer(x + y)


@pytest.mark.parametrize(
    "given", [torch.zeros(2, 3), (torch.zeros(2, 3), 1), [torch.zeros(2, 3)], {"y": 2, "x": torch.zeros(2, 3)}]
)
def test_inputs_of_every_form(given: Any):
    model = Sum()
    assert account(model, given).dense_flops == 24
    assert latency(model, given, min_run_time=1e-4).runs > 0


def test_masks_of_another_model_and_nothing_to_prune_are_refused():
    with pytest.raises(ValueError, match="name no parameter of this Sequential"):
        account(mlp(), torch.zeros(1, 8), Masks({"x.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"mask '0.weight' has shape"):
        account(mlp(), torch.zeros(1, 8), Masks({"0.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="nothing can be pruned"):
        account(nn.LayerNorm(3), torch.zeros(1, 3))


def test_the_table_names_its_denominators():
    model = mlp()
    table = str(account(model, torch.zeros(BATCH, 8), Masks({"0.weight": half(model[0].weight)})))
    assert table.splitlines() == [
        "  weight  shape  kept   of  density  FLOPs  sparse FLOPs",
        "0.weight   16x8    64  128   50.00%    768           384",
        "3.weight   4x16    64   64  100.00%    384           384",
        "prunable weights  128 of 192 kept, 66.67%",
        "all parameters    176 of 240 kept, 73.33%",
        "bytes             856 packed of 1,096 dense, 78.10%; 1,096 in fp32",
        "FLOPs a call      1,152 dense, 768 sparse in theory, 1,152 real",
    ]
