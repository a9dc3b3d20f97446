import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

from prune.pruner import Pruner
from prune.pruner.scope import Scope
from prune.structures import Unstructured, structure_named
from tests.helpers.ranks import on_ranks


class Mine(nn.Module):
    """A layer that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.scale = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.ones(1, 6))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos_embed = nn.Embedding(9, 4), nn.Parameter(torch.zeros(1, 3, 4))
        self.norm, self.cls = nn.LayerNorm((3, 4)), nn.Parameter(torch.zeros(1, 1, 4))
        self.mine, self.turn = Mine(), parametrizations.orthogonal(nn.Linear(4, 4, bias=False))
        self.head = nn.Linear(4, 5, bias=False)


TOTAL = 9 * 4 + 12 + 2 * 12 + 4 + 30 + 6 + 16 + 20


def left(structure: Any = Unstructured(), **choice: Any) -> dict[str, float]:  # noqa: B008 - frozen
    return {each.name: each.share for each in Scope(Net(), structure, **choice).dense}


def test_matrices_outside_embeddings_and_norms_are_named_with_their_shares() -> None:
    assert left() == {"mine.mixing": 30 / TOTAL, "turn.parametrizations.weight.original": 16 / TOTAL}
    text = (
        r"31.1% of the parameters of this Net are matrices that stay dense: 'mine.mixing' \(20.3%\): of Mine, no layer "
        r"that is known; 'turn.parametrizations.weight.original' \(10.8%\): made by _Orthogonal, whose result is not "
        r"zero where this is. The density is that of the others"
    )
    with pytest.warns(UserWarning, match=text):
        Pruner()(Net(), 0.5)


class RMS2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 5))


@pytest.mark.parametrize("name", ["norm", "norm1", "q_norm", "mixer"])
def test_a_norm_of_ones_own_is_known_by_what_it_is_called(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.add_module(name, RMS2d())
    told = [each.name for each in Scope(net, Unstructured()).dense]
    assert told == ([f"{name}.weight"] if name == "mixer" else [])


def test_it_is_said_once_a_network() -> None:
    net = Net()
    with pytest.warns(UserWarning, match="stay dense"):
        Pruner().check(net, 0.5)
    Pruner()(net, 0.5)
    Pruner().check(net, 0.2)
    with pytest.warns(UserWarning, match="stay dense"):
        Pruner()(Net(), 0.5)


def test_what_is_excluded_or_too_small_or_not_included_is_left_without_a_word() -> None:
    assert left(exclude=(Mine, "turn.*")).keys() == set()
    assert left(exclude=("turn.weight",)).keys() == {"mine.mixing"}
    assert left(smallest=20).keys() == {"mine.mixing"}
    assert left(include=("head.*",)).keys() == set()
    assert left(include=("*.weight",)).keys() == {"turn.parametrizations.weight.original"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(exclude=["mine.*", "turn.*"])(Net(), 0.5)


def test_what_was_asked_for_by_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"include pattern 'turn.\*' .* cannot be pruned: .* made by _Orthogonal"):
        Pruner(include=["head.*", "turn.*"])(Net(), 0.5)
    with pytest.raises(ValueError, match=r"include pattern .*Mine'> .* cannot be pruned: 'mine.mixing' is of Mine"):
        Pruner(include=Mine)(Net(), 0.5)


@pytest.mark.parametrize("structure", ["channel", "2:4", "4x1"])
def test_what_a_structure_does_not_fit_is_named_or_refused(structure: str) -> None:
    model = nn.Sequential(nn.Bilinear(4, 4, 4, bias=False), nn.Linear(4, 4, bias=False))
    (bilinear,) = Scope(model, structure_named(structure)).dense
    assert (bilinear.name, bilinear.share) == ("0.weight", 64 / 80)
    assert "bilinear layer" in bilinear.why
    with pytest.raises(ValueError, match=r"include pattern '0.\*' matches only weights .* does not cover \('0.weight'"):
        Pruner(structure=structure, include=["0.*", "1.*"]).check(model, 0.5)
    with pytest.raises(ValueError, match=r"fits none of these weights: '0.weight' is of a bilinear layer"):
        Pruner(structure=structure, include="0.*")(model, 0.5)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.LSTM(4, 4), "gates of a recurrent layer"),
        (nn.MultiheadAttention(4, 2), "attention heads"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "under weight_norm, which divides by the norm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_are_of_layers_that_can_lose_them(layer: nn.Module, why: str) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=f"stay dense: .*{why}"):
        masks = Pruner(structure="channel")(model, 0.5)
    assert list(masks) == ["1.weight"]


def test_known_networks_have_nothing_to_tell() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    for model in (
        hf.ViTModel(hf.ViTConfig(**sizes, image_size=8, patch_size=4)),
        hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=9)),
        hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=9, tie_word_embeddings=True)),
        nn.TransformerEncoderLayer(8, 2, 8),
    ):
        assert Scope(model, Unstructured()).dense == []


def test_a_weight_shared_with_something_else_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Mine())
    model[2].mixing = model[0].weight
    (each,) = Scope(model, Unstructured()).dense
    assert (each.name, each.why) == ("0.weight", "shared with '2.mixing'")


def _divided() -> tuple[dict[str, str], list[str], str]:
    torch.distributed.init_process_group("gloo")
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm of old says that it is
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    norms = (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal)
    net = fully_shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), *(norm(nn.Linear(4, 4)) for norm in norms), old))
    with pytest.warns(UserWarning, match="matrices that stay dense"):
        masks = Pruner()(net, 0.5)
    with pytest.raises(ValueError, match=r"include pattern '2\.weight'") as refused:
        Pruner(include="2.weight")(net, 0.5)
    return {each.name: each.why for each in Scope(net, Unstructured()).dense}, list(masks), str(refused.value)


def test_a_parametrized_layer_that_fsdp2_divides_stays_dense_by_name() -> None:
    ((why, masked, refused),) = on_ranks(_divided, ranks=1)
    assert masked == ["0.weight", "1.weight"]
    assert why.keys() == {
        "2.parametrizations.weight.original1",
        "3.parametrizations.weight.original",
        "4.parametrizations.weight.original",
        "5.weight_v",
    }
    assert all("which FSDP2 (fully_shard) divides" in each for each in why.values())
    assert why["5.weight_v"].startswith("under weight_norm, which")
    assert "made by weight_norm, which FSDP2" in refused
    assert "exclude it, or train it with DDP" in refused
