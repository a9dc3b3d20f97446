"""The transformer against its formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.tiny_transformers import KINDS, SEQUENCES, TINY, built, inputs_for
from workbench.models import Transformer
from workbench.models.activations import GLU, gain, make, names
from workbench.models.transformer.layers import (
    Attention,
    TransformerLayer,
    apply_rotary_embedding,
    pairwise_attention_mask,
    rotary_embedding,
)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- formulas


def naive(attention: Attention, x: Tensor, allowed: Tensor, places: Tensor | None) -> Tensor:
    """Vaswani et al. 2017, equation 1, one number at a time; Su et al. 2021, equation 14: pairs as complex numbers."""
    d = attention.head_dim
    out = torch.zeros_like(x)
    for b, sequence in enumerate(x):
        q, k, v = (part(sequence) for part in (attention.query, attention.key, attention.value))
        for start in range(0, x.shape[-1], d):
            for i in range(len(sequence)):
                scores = []
                for j in range(len(sequence)):
                    mine, other = q[i, start : start + d], k[j, start : start + d]
                    if places is not None:
                        theta = [10_000 ** (-2 * pair / d) for pair in range(d // 2)]
                        turn = torch.tensor([(places[b, i] - places[b, j]) * t for t in theta], dtype=torch.float64)
                        mine = torch.complex(mine[: d // 2], mine[d // 2 :]) * torch.exp(1j * turn)
                        other = torch.complex(other[: d // 2], other[d // 2 :])
                    score = (mine * other.conj()).real.sum() if places is not None else mine @ other
                    scores.append(score / math.sqrt(d) if allowed[b, i, j] else torch.tensor(-math.inf).double())
                weights = torch.stack(scores).softmax(0)
                out[b, i, start : start + d] = sum(w * v[j, start : start + d] for j, w in enumerate(weights))
    return attention.output(out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_is_the_formula(causal: bool, rotary: bool, masked: bool) -> None:
    attention = Attention(8, 2, causal).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    real = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    seen = torch.ones(2, 5, 5, dtype=torch.bool) if not masked else real[:, None, :] | torch.eye(5, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    places = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 2, 3]])
    turns = rotary_embedding(places, 4, torch.float64) if rotary else None
    found = attention(x, pairwise_attention_mask(real, causal) if masked else None, turns)
    torch.testing.assert_close(found, naive(attention, x, seen, places if rotary else None))


@given(length=st.integers(1, 6), causal=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_query_has_a_key_and_padding_reaches_nobody(length: int, causal: bool, seed: int) -> None:
    real = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    allowed = pairwise_attention_mask(real, causal)[:, 0]
    for b in range(3):
        for i in range(length):
            for j in range(length):
                assert bool(allowed[b, i, j]) == (i == j or (bool(real[b, j]) and not (causal and j > i)))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        turns = rotary_embedding(torch.tensor([[i, j]]), 6, torch.float64)
        both = torch.cat([apply_rotary_embedding(x.expand(1, 1, 2, 6), turns) for x in (q, k)])
        return both[0, 0, 0] @ both[1, 0, 1]

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert abs(score(7, 3) - score(7, 2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_far_places_are_told_apart_in_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 knows no odd number beyond 256: the angles must not be of that type."""
    places = torch.arange(2000)[None]
    x = torch.randn(1, 1, 2000, 8).to(dtype)
    found = apply_rotary_embedding(x, rotary_embedding(places, 8, dtype))
    assert found.dtype == dtype
    exact = apply_rotary_embedding(x.double(), rotary_embedding(places, 8, torch.float64))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_layer_is_that_of_torch(pre_norm: bool, causal: bool) -> None:
    mine = TransformerLayer(16, 4, 24, "gelu", pre_norm=pre_norm, causal=causal).double().eval()
    peer = nn.TransformerEncoderLayer(
        16, 4, 24, activation="gelu", batch_first=True, norm_first=pre_norm, dtype=torch.float64
    ).eval()
    for parameter in mine.parameters():
        parameter.normal_(0, 0.3)
    parts: Any = mine.attention
    inputs = (parts.query, parts.key, parts.value)
    state = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in inputs]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in inputs]),
    }
    modules = {"self_attn.out_proj": parts.output, "norm1": mine.norm1, "norm2": mine.norm2}
    modules |= {"linear1": mine.feed_forward.up, "linear2": mine.feed_forward.down}
    for name, module in modules.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    peer.load_state_dict(state)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    later = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(mine(x), peer(x, later))
    expected = peer(x, later, src_key_padding_mask=~real)
    torch.testing.assert_close(mine(x, pairwise_attention_mask(real, causal))[real], expected[real])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_model_is_its_parts(kind: str) -> None:
    model, x = built(kind), inputs_for(kind)
    given: Any = model.init_args
    h = model.embedding(x) * (4 if given["vocabulary"] else 1)
    if model.positions is not None:
        h = h + 4 * model.positions.weight[:7]
    turns = rotary_embedding(torch.arange(7)[None], 4, torch.float64) if model.positions is None else None
    for layer in model.layers:
        h = layer(h, None, turns)
    if given["pre_norm"]:
        h = model.norm(h)
    if given["classes"]:
        h = h.mean(1) if given["pooling"] == "mean" else h[:, 0]
    torch.testing.assert_close(model(x), h @ model.head.weight.T + (0 if model.head.bias is None else model.head.bias))
    assert model(x).shape == ((4, 3) if given["classes"] else (4, 7, 20))
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert bool(biases) == given["bias"]


@pytest.mark.parametrize("activation", names())
@torch.no_grad()
def test_gated_nets_are_the_formula(activation: str) -> None:
    layer: Any = TransformerLayer(6, 2, 9, activation, gated=True, bias=True).double()
    net, x = layer.feed_forward, torch.randn(2, 6, dtype=torch.float64)
    gate, up = (x @ part.weight.T + part.bias for part in (net.gate, net.up))
    torch.testing.assert_close(net(x), (make(activation)(gate) * up) @ net.down.weight.T + net.down.bias)
    assert gate.shape == (2, 6)


def test_gated_nets_by_name() -> None:
    for name, inner in (("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu")):
        one = Transformer(20, **TINY, activation=name)
        assert (one.init_args["activation"], one.init_args["gated"]) == (inner, True)
        other = Transformer(20, **TINY, activation=inner, gated=True)
        other.load_state_dict(one.state_dict())
        x = torch.randint(0, 20, (2, 5))
        assert torch.equal(one(x), other(x))
        assert sum(isinstance(module, GLU) for module in one.modules()) == 2


@given(width=st.integers(1, 40), width_ffn=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_gated_nets_are_as_large(width: int, width_ffn: int) -> None:
    """Shazeer 2020, section 2: three matrices of two thirds of the width."""
    plain, gated = (TransformerLayer(width, 1, width_ffn, "silu", gate, bias=False) for gate in (False, True))
    assert abs(size(plain) - size(gated)) <= width
    assert (size(plain) == size(gated)) == (width_ffn % 3 == 0) or width_ffn == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "width_ffn"), [(128, 512), (64, 256), (64, 100)])
def test_all_activations_have_as_many_parameters(width: int, width_ffn: int, bias: bool) -> None:
    shape: dict[str, Any] = {"width": width, "width_ffn": width_ffn, "bias": bias, "max_length": 32}
    plain, *gated = (size(Transformer(50, **shape, activation=name)) for name in ("gelu", "swiglu", "geglu", "reglu"))
    assert gated == [gated[0]] * 3
    assert abs(gated[0] / plain - 1) < 0.01


# --- padding and order


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    model = built(kind)
    inputs = inputs_for(kind, 3, 9)
    for lengths in ((9, 5, 1),):
        mask = torch.arange(9) < torch.tensor(lengths)[:, None]
        expected = [model(inputs[b : b + 1, :n])[0] for b, n in enumerate(lengths)]
        for left in (False, True):
            for junk in range(2):
                padded = inputs_for(kind, 3, 9)
                if inputs.is_floating_point() and junk:
                    padded[:] = math.nan
                padded[mask] = inputs[mask]
                where = mask
                if left:
                    padded = torch.stack([row.roll(9 - n, 0) for row, n in zip(padded, lengths)])
                    where = mask.flip(1)
                found = model(padded, where.long())
                assert found.isfinite().all()
                for b in range(3):
                    torch.testing.assert_close(found[b] if kind in SEQUENCES else found[b, where[b]], expected[b])


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_padding_alone_are_finite(kind: str) -> None:
    model, x = built(kind).train(), inputs_for(kind, 3, 6)
    mask = torch.tensor([[0] * 6, [1] * 6, [0, 0, 1, 0, 1, 1]])
    found = model(x, mask)
    found.square().sum().backward()
    assert found.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(found[1:2], model(x[1:2]), msg="a sequence does not see its neighbours'")
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(model(x, mask.to(dtype)), found)


@pytest.mark.parametrize("kind", ["causal", "tied"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(kind: str, masked: bool) -> None:
    model, x = built(kind), inputs_for(kind)
    mask = torch.ones_like(x) if masked else None
    before = model(x, mask)
    for place in range(7):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % 20
        after = model(changed, mask)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-14)
        assert (after[:, place:] - before[:, place:]).abs().amax(-1).min() > 1e-6, "and all that follow see it"


@pytest.mark.parametrize("kind", ["masked", "series"])
@torch.no_grad()
def test_an_encoder_looks_both_ways_and_knows_order(kind: str) -> None:
    model, x = built(kind), inputs_for(kind)
    changed = x.clone()
    changed[:, -1] = inputs_for(kind)[:, 0] if kind == "series" else (x[:, -1] + 1) % 20
    after = model(changed) - model(x)
    assert (after[:, 0] if kind == "masked" else after).abs().min() > 1e-9
    assert not torch.allclose(model(x.flip(1)), model(x))


# --- initial weights


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu"])
def test_initial_weights_have_the_gains_that_are_documented(activation: str, pre_norm: bool) -> None:
    model: Any = Transformer(400, width=200, layers=2, width_ffn=600, activation=activation, pre_norm=pre_norm)
    own = gain({"swiglu": "silu"}.get(activation, activation))
    branch = 0.5 if pre_norm else 1.0
    layer = model.layers[1]
    expected = dict.fromkeys((layer.attention.query, layer.attention.key, layer.attention.value, model.head), 1.0)
    expected |= {layer.attention.output: branch, layer.feed_forward.up: 1.0, layer.feed_forward.down: own * branch}
    expected |= {layer.feed_forward.gate: 1.0} if activation == "swiglu" else {}
    for part, factor in expected.items():
        assert float(part.weight.detach().std() * part.in_features**0.5) == pytest.approx(factor, rel=0.02)
        assert not part.bias.any()
    for part in (model.embedding, model.positions):
        assert float(part.weight.detach().std() * 200**0.5) == pytest.approx(1, rel=0.02)


@torch.no_grad()
def test_a_deep_pre_norm_stream_stays_of_the_size_of_its_input() -> None:
    x = torch.randint(0, 50, (8, 20))
    for activation in ("relu", "gelu", "swiglu"):
        model = Transformer(50, width=128, layers=24, activation=activation).eval()
        h = (model.embedding(x) + model.positions(torch.arange(20))) * model.scale
        first = h.square().mean()
        for layer in model.layers:
            h = layer(h)
        assert 1 < h.square().mean() / first < 2, "branches add at most one to the two of the input"
        logits = model(x)
        assert 0.5 < logits.std() < 2


def test_one_seed_gives_every_activation_the_same_weights_up_to_gains() -> None:
    def weights(activation: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return dict(Transformer(20, **TINY, activation=activation).named_parameters())

    one, other = weights("relu"), weights("gelu")
    for name, weight in one.items():
        factor = gain("gelu") / gain("relu") if name.endswith("down.weight") else 1
        torch.testing.assert_close(other[name], weight * factor)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "vocabulary=None, features=None: give one"),
        ({"vocabulary": 5, "features": 5, "classes": 2}, "vocabulary=5, features=5: give one"),
        ({"features": 5}, "classes=None: give classes"),
        ({"vocabulary": 5, "classes": 2, "tied": True}, "tied=True, classes=2: only a language model"),
        ({"vocabulary": 0}, "vocabulary=0: must be at least 1"),
        ({"vocabulary": 5, "layers": 0, "width_ffn": -1}, "layers=0, width_ffn=-1: must be at least 1"),
        ({"vocabulary": 5, "heads": 3}, "width=128, heads=3: give a number of heads that divides it"),
        ({"vocabulary": 5, "width": 12, "positions": "rotary"}, "heads=4: rotary positions need heads of an even"),
        ({"vocabulary": 5, "dropout": 1.0}, "dropout=1.0: give at least 0 and less than 1"),
        ({"vocabulary": 5, "norm": "batch"}, "norm='batch': use one of layer, rms"),
        ({"vocabulary": 5, "positions": "none"}, "positions='none': use one of learned, rotary"),
        ({"vocabulary": 5, "pooling": "max"}, "pooling='max': use one of mean, cls"),
        ({"vocabulary": 5, "init": "mine"}, "init='mine': use one of own, he"),
        ({"vocabulary": 5, "activation": "glu"}, "unknown activation 'glu'"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(**arguments)


def test_inputs_that_do_not_fit_are_named() -> None:
    tokens, series = Transformer(20, **TINY), Transformer(**{**TINY, **KINDS["series"]})
    with pytest.raises(ValueError, match=r"torch.int64 \[2, 10\], longer than max_length=9"):
        tokens(torch.zeros(2, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 5\]: give tokens, int64 \[B, L\]"):
        tokens(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 5, 4\]: give numbers, float \[B, L, 5\]"):
        series(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"\[2, 5\], attention_mask \[2, 4\]: give one number a position"):
        tokens(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 4))
    assert series(torch.zeros(2, 300, 5)).shape == (2, 3), "rotary positions know no limit"
