"""Parts of fused layers are what the models themselves take for queries, keys and values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from distill.features import capture, matches
from distill.fused import is_fused
from distill.losses import AttentionRelation, SimilarityPreserving
from distill.objective import Objective, Outputs
from distill.terms import Term

SIZES = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LONG = {"intermediate_size": 8, "max_position_embeddings": 8}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 8, "vocab_size": 11}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "h.0.attn.c_attn", GPT2),
    "bigcode, several queries": ("GPTBigCode", "h.0.attn.c_attn", {**GPT2, "multi_query": True}),
    "bigcode": ("GPTBigCode", "h.0.attn.c_attn", {**GPT2, "multi_query": False}),
    "neox": ("GPTNeoX", "layers.0.attention.query_key_value", {**SIZES, **LONG}),
    "bloom": ("Bloom", "h.0.self_attention.query_key_value", {**SIZES, "n_head": 4, "n_layer": 1}),
    "falcon": ("Falcon", "h.0.self_attention.query_key_value", {**SIZES, "multi_query": False}),
    "falcon, several queries": ("Falcon", "h.0.self_attention.query_key_value", {**SIZES, "multi_query": True}),
    "falcon, groups": (
        "Falcon",
        "h.0.self_attention.query_key_value",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "phi3": ("Phi3", "layers.0.self_attn.qkv_proj", {**SIZES, **LONG, "num_key_value_heads": 2}),
    "persimmon": ("Persimmon", "layers.0.self_attn.query_key_value", {**SIZES, **LONG, "qk_layernorm": False}),
    "modernbert": ("ModernBert", "layers.0.attn.Wqkv", {**SIZES, **LONG, "global_attn_every_n_layers": 1}),
    "mpt": ("Mpt", "blocks.0.attn.Wqkv", {"d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 11}),
}


def build(name: str) -> tuple[Any, str]:
    kind, path, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**ENDS, **options})
    return getattr(transformers, f"{kind}Model")(config).eval(), path


def heads_of(feature: Tensor, width: int) -> Tensor:
    """[B, heads, L, width] of [B, L, heads * width]."""
    return feature.unflatten(-1, (-1, width)).transpose(1, 2)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("bloom", "mpt")])
def test_parts_are_what_attention_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first position, which rotary embeddings leave as it is, and for values anywhere."""
    model, path = build(name)
    seen: list[Any] = []
    attention = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query, key, value))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    tokens = torch.randint(1, 11, (2, 5))
    with torch.no_grad(), capture(model, [f"{path}:{part}" for part in ("query", "key", "value")]) as features:
        model(input_ids=tokens)
        found = [heads_of(each, 4) for each in features.values()]
    [expected] = seen
    for part, own, theirs in zip(("query", "key", "value"), found, expected):
        # Keys and values of a group may be repeated for each of its queries.
        again = own if own.shape == theirs.shape else own.repeat_interleave(theirs.shape[1] // own.shape[1], 1)
        places = slice(None) if part == "value" else slice(1)
        assert torch.allclose(again[:, :, places], theirs[:, :, places], atol=1e-6), part
        assert own.std() > 0


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_parts_of_models_with_attention_of_their_own(name: str) -> None:
    model, path = build(name)
    with torch.no_grad(), capture(model, [path, f"{path}:query", f"{path}:key", f"{path}:value"]) as features:
        model(input_ids=torch.randint(1, 11, (2, 5)))
        whole, *found = features.values()
    if name == "bloom":
        expected = [each.transpose(1, 2).flatten(2) for each in model.h[0].self_attention._reshape(whole)]
    else:
        expected = list(whole.chunk(3, -1))
    assert all(torch.equal(own, theirs) for own, theirs in zip(found, expected))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("width", [None, 6])
def test_torch_s_attention_has_parts_too(batch_first: bool, width: int | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=width, vdim=width)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.attention(x, other, value=other)[0]

    model = Model()
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, width or 8)
    given = (x, other) if batch_first else (x.transpose(0, 1), other.transpose(0, 1))
    with capture(model, [f"attention:{part}" for part in ("query", "key", "value")]) as features:
        out = model(*given)
        q, k, v = (heads_of(each, 4) for each in features.values())
    by_hand = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = model.attention.out_proj(by_hand)
    assert torch.allclose(expected if batch_first else expected.transpose(0, 1), out, atol=1e-6)
    assert torch.autograd.grad(q.sum(), next(model.parameters()))[0].abs().sum() > 0


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x).sum()


def test_layouts_that_are_not_known() -> None:
    model, x = Own(), torch.randn(2, 3, 4)
    with capture(model, ["qkv:query"]), pytest.raises(ValueError, match="'qkv' of Own, 12 wide, .*name 'qkv:1/3'"):  # noqa: RUF043
        model(x)
    with capture(model, ["qkv:1/3", "qkv:3/3"]) as features:
        model(x)
        assert list(features) == ["qkv:1/3", "qkv:3/3"]
        assert torch.equal(features["qkv:3/3"], model.qkv(x)[..., 8:])
    with pytest.raises(ValueError, match="ends in ':5/3'"), capture(model, ["qkv:5/3"]):
        pass
    assert matches("qkv:query", "*:query")
    assert not matches("qkv:query", "qkv")


def test_relations_of_a_whole_fused_layer_are_refused() -> None:
    assert is_fused("h.0.attn.c_attn")
    assert not is_fused("h.0.attn.q_proj")
    with pytest.raises(ValueError, match=r"'a\.qkv' makes queries, keys and values at once"):
        Term(AttentionRelation(2), student="a.query", teacher=["a.qkv"])
    Term(AttentionRelation(2), student="a.query", teacher="a.qkv:query")
    Term(SimilarityPreserving(), student="a.qkv")
    objective = Objective({"pattern": Term(AttentionRelation(2), student="a.*")})
    feature = {"a.qkv": torch.randn(1, 3, 12)}
    outputs = Outputs(torch.zeros(1, 2), feature)
    with pytest.raises(ValueError, match=r"name it, 'a\.qkv:query'"):
        objective(outputs, outputs, {"pattern": 1.0}, lambda logits: logits.sum())
