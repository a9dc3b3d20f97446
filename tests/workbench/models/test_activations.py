import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from workbench.models import activations
from workbench.models.activations import (
    GEGLU,
    GLU,
    SwiGLU,
    gain,
    gate,
    glu_width,
    init_,
    make,
    names,
    spec,
    swap_activation,
)

EVERY = names()


def derivative(name, x, order=1):
    y = torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_()
    f = spec(name).function(y)
    for _ in range(order):
        (f,) = torch.autograd.grad(f.sum(), y, create_graph=True)
    return f.detach()


def integral(g, mean=0.0, std=1.0):
    """E g(X) by an independent adaptive quadrature, cut at the kink."""
    kink = -mean / std
    edges = sorted({-10.0, min(max(kink, -10.0), 10.0), 10.0})
    parts = [
        integrate.quad(lambda z: g(mean + std * z) * stats.norm.pdf(z), a, b, epsabs=1e-12, epsrel=1e-11, limit=400)[0]
        for a, b in pairwise(edges)
    ]
    return sum(parts)


# --- the table


def test_the_table_is_complete():
    assert EVERY == ("relu", "gelu", "gelu_tanh", "silu", "mish", "elu", "tanh", "softplus", "identity")
    assert all(spec(name).name == name for name in EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_module_and_function_are_the_same(name):
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    module = make(name)
    assert torch.equal(module(x), spec(name).function(x))
    assert not list(module.parameters())
    assert make(name) is not module


@pytest.mark.parametrize("name", EVERY)
def test_smooth_rows_have_no_jump_and_the_others_do(name):
    step = 1e-9
    jumps = [
        abs(float(derivative(name, step, order) - derivative(name, -step, order)))
        for order in (1, 2)
        if name != "identity"
    ]
    assert spec(name).smooth == (max(jumps, default=0.0) < 1e-6)


def test_gelu_is_exact_and_its_tanh_form_is_not():
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(make("gelu")(x), exact, rtol=0, atol=1e-15)
    assert float((make("gelu_tanh")(x) - exact).abs().max()) == pytest.approx(4.8e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "order", "low", "low_at", "high", "high_at"),
    [
        ("gelu", 1, -0.12890, -math.sqrt(2), 1.12890, math.sqrt(2)),
        ("gelu", 2, -0.10798, 2.0, 0.79788, 0.0),
        ("silu", 1, -0.09984, -2.3994, 1.09984, 2.3994),
        ("silu", 2, -0.0369, None, 0.5, 0.0),
    ],
)
def test_extrema_of_derivatives(name, order, low, low_at, high, high_at):
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    slope = derivative(name, x, order)
    assert float(slope.min()) == pytest.approx(low, abs=5e-5)
    assert float(slope.max()) == pytest.approx(high, abs=5e-5)
    assert abs(float(x[slope.argmax()])) == pytest.approx(abs(high_at), abs=2e-3)
    if low_at is not None:
        assert abs(float(x[slope.argmin()])) == pytest.approx(abs(low_at), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("glu", "gelu"), ("swish", "silu"), ("GELU", "gelu"), ("gelu-tanh", "gelu_tanh"), ("relu6", "relu")],
)
def test_unknown_names_are_told_the_nearest(name, near):
    for call in (make, gain, gate, spec, lambda n: swap_activation(nn.Sequential(nn.ReLU()), n)):
        with pytest.raises(ValueError, match=f"unknown activation '{name}'.*Did you mean .*'{near}'.*softplus"):
            call(name)


def test_far_names_are_told_all():
    with pytest.raises(ValueError, match=r"unknown activation 'zzz'\. Use one of relu, gelu"):
        make("zzz")


# --- moments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relu", math.sqrt(2)),
        ("gelu", (1 / 3 + 1 / (2 * math.sqrt(3) * math.pi)) ** -0.5),
        ("identity", 1.0),
    ],
)
def test_gain_in_closed_form(name, value):
    assert gain(name) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relu", 1.4142),
        ("gelu", 1.5335),
        ("silu", 1.6765),
        ("elu", 1.2452),
        ("tanh", 1.5925),
        ("mish", 1.4868),
    ],
)
def test_gain_as_published(name, value):
    assert gain(name) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("name", EVERY)
def test_gain_against_another_quadrature(name):
    second = integral(lambda x: float(spec(name).function(torch.tensor(x, dtype=torch.float64))) ** 2)
    assert gain(name) == pytest.approx(second**-0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("relu", 0.5),
        ("gelu", 0.45585),
        ("silu", 0.37948),
        ("elu", 0.66810),
        ("tanh", 0.46440),
        ("mish", 0.47908),
    ],
)
def test_second_moment_of_the_gate(name, second):
    assert gate(name)[1] == pytest.approx(second, abs=5e-6)


@settings(deadline=None, max_examples=60)
@given(std=st.floats(0.05, 50))
def test_self_gated_units_pass_half_of_any_centred_gaussian(std):
    for name in ("relu", "gelu", "gelu_tanh", "silu"):
        assert gate(name, 0.0, std)[0] == pytest.approx(0.5, abs=1e-10)
    assert gate("identity", 0.0, std) == pytest.approx((1.0, 1.0), abs=1e-12)


def test_half_fails_off_centre():
    assert gate("gelu", -1.0)[0] == pytest.approx(0.130, abs=5e-4)
    assert gate("relu", -1.0)[0] == pytest.approx(0.159, abs=5e-4)


@settings(deadline=None, max_examples=60)
@given(mean=st.floats(-20, 20), std=st.floats(0.05, 50))
def test_gates_in_closed_form_for_any_gaussian(mean, std):
    # ReLU: P(Z > 0). GELU: d/dm of E GELU(Z) = m Phi(m / r) + s^2 phi(m / r) / r with r^2 = 1 + s^2.
    below = stats.norm.cdf(mean / std)
    assert gate("relu", mean, std) == pytest.approx((below, below), abs=1e-9)
    r = math.sqrt(1 + std**2)
    u = mean / r
    expected = stats.norm.cdf(u) + u * stats.norm.pdf(u) * (1 - std**2 / r**2)
    assert gate("gelu", mean, std)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.5, 0.3), (3.0, 12.0)])
def test_gate_against_another_quadrature(name, mean, std):
    for power in (1, 2):
        expected = integral(lambda x, p=power: float(derivative(name, x)) ** p, mean, std)
        assert gate(name, mean, std)[power - 1] == pytest.approx(expected, abs=1e-8)


def test_gate_against_samples():
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 0.5
    slope = derivative("mish", draws)
    first, second = gate("mish", -0.5, 2.0)
    assert float(slope.mean()) == pytest.approx(first, abs=5e-3)
    assert float((slope**2).mean()) == pytest.approx(second, abs=5e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_gate_refuses_no_gaussian(mean, std):
    with pytest.raises(ValueError, match="finite std above 0"):
        gate("gelu", mean, std)


def test_moments_need_no_surroundings():
    """Neither grad mode, inference mode, default device, default dtype nor random state matter."""
    for function in (gain, gate, activations._legendre):
        function.cache_clear()
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        inside = gain("silu"), gate("silu", 0.3, 0.7)
    for function in (gain, gate):  # the nodes stay those made in there
        function.cache_clear()
    assert (gain("silu"), gate("silu", 0.3, 0.7)) == inside
    assert torch.equal(torch.get_rng_state(), state)


def test_only_torch_is_needed():
    code = "import sys, workbench.models.activations; print(*{'scipy', 'lightning', 'transformers'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# --- gated linear units


@pytest.mark.parametrize(("build", "name"), [(SwiGLU, "silu"), (GEGLU, "gelu")])
def test_glu_is_its_formula(build, name):
    block = build(5, 7, 3, bias=True)
    x = torch.randn(2, 4, 5)
    gated = spec(name).function(x @ block.gate.weight.T + block.gate.bias)
    expected = (gated * (x @ block.up.weight.T + block.up.bias)) @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(block(x), expected)
    assert isinstance(block, GLU)
    assert sum(p.ndim == 2 for p in block.parameters()) == 3


@settings(deadline=None, max_examples=60)
@given(features=st.integers(1, 64), hidden=st.integers(2, 4096))
def test_glu_width_matches_parameters(features, hidden):
    plain, per_unit = 2 * features * hidden, 3 * features
    width = glu_width(hidden)
    assert abs(per_unit * width - plain) <= per_unit / 2  # no other width is nearer


@settings(deadline=None, max_examples=60)
@given(hidden=st.integers(1, 4096), multiple=st.integers(1, 256))
def test_glu_width_is_the_nearest_multiple(hidden, multiple):
    width = glu_width(hidden, multiple)
    assert width % multiple == 0
    assert width >= multiple
    assert width == multiple or abs(width - 2 * hidden / 3) <= multiple / 2


@pytest.mark.parametrize("arguments", [(0,), (-3,), (8, 0)])
def test_glu_width_refuses_nothing(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        glu_width(*arguments)


# --- initialisation


def chain(depth=3, width=40, name="gelu", inputs=30):
    layers = [nn.Linear(inputs, width)]
    for _ in range(depth - 2):
        layers += [make(name), nn.Linear(width, width)]
    return nn.Sequential(*layers, make(name), nn.Linear(width, 7))


def weights(module):
    return [p.detach().clone() for n, p in module.named_parameters() if n.endswith("weight")]


def test_init_is_the_same_draw_up_to_gains():
    drawn = {}
    for name in ("relu", "gelu"):
        for kind in ("own", "he"):
            torch.manual_seed(3)
            model = chain(4, name=name)
            drawn[name, kind] = weights(init_(model, name, kind))
            assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    torch.manual_seed(3)
    chain(4)
    unit = [torch.randn(w.shape) / math.sqrt(w.shape[1]) for w in drawn["relu", "own"]]
    for (name, kind), drawn_weights in drawn.items():
        hidden = gain(name) if kind == "own" else math.sqrt(2)
        factors = [1.0 if kind == "own" else hidden, hidden, hidden, 1.0]
        for weight, base, factor in zip(drawn_weights, unit, factors):
            torch.testing.assert_close(weight, base * factor)


def test_init_of_convolutions_counts_their_fan_in():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 5, groups=2)
    init_(nn.Sequential(nn.Conv2d(3, 32, 3), nn.GELU(), conv, nn.GELU(), nn.Conv2d(64, 4, 3)), "gelu")
    assert float(conv.weight.detach().std()) == pytest.approx(gain("gelu") / math.sqrt(16 * 25), rel=0.02)


def test_init_of_a_glu():
    torch.manual_seed(0)
    block = init_(SwiGLU(300, 400, 300), "silu")
    assert float(block.gate.weight.detach().std() * math.sqrt(300)) == pytest.approx(1.0, rel=0.02)
    assert float(block.up.weight.detach().std() * math.sqrt(300)) == pytest.approx(1.0, rel=0.02)
    assert float(block.down.weight.detach().std() * math.sqrt(400)) == pytest.approx(gain("silu"), rel=0.02)
    assert float(block(torch.randn(2000, 300)).detach().square().mean()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "elu", "tanh"])
def test_own_gain_keeps_the_second_moment_in_depth(name):
    torch.manual_seed(0)
    model = init_(chain(9, 1024, name, inputs=1024), name)
    with torch.no_grad():
        assert float(model[:-2](torch.randn(64, 1024)).square().mean()) == pytest.approx(1.0, rel=0.25)


def test_he_starves_gelu_where_own_gain_does_not():
    """The squared gradient behind 30 layers, relative to ReLU's: the reason for per-activation gains."""
    ratio = {}
    for name, kind in [("relu", "he"), ("gelu", "he"), ("gelu", "own")]:
        torch.manual_seed(0)
        model = init_(chain(30, 512, name, inputs=512), name, kind)
        x = torch.randn(32, 512, requires_grad=True)
        model(x).sum().backward()
        ratio[name, kind] = float(x.grad.square().mean())
    assert ratio["gelu", "he"] < 1e-3 * ratio["relu", "he"]
    assert ratio["gelu", "own"] > 0.1 * ratio["relu", "he"]


def test_init_refuses():
    with pytest.raises(ValueError, match="init='xavier': use one of own, he"):
        init_(chain(), "gelu", "xavier")
    with pytest.raises(ValueError, match="LayerNorm has no Linear or Conv layer"):
        init_(nn.LayerNorm(3), "gelu")
    with pytest.raises(ValueError, match="unknown activation"):
        init_(chain(), "gleu")


# --- swapping


@pytest.mark.parametrize("old", [n for n in EVERY if n != "identity"])
@pytest.mark.parametrize("new", EVERY)
def test_every_row_swaps_into_every_other(old, new):
    model = nn.Sequential(nn.Linear(3, 4), make(old), nn.Sequential(nn.Linear(4, 4), make(old)), nn.Sigmoid()).eval()
    keys, x = list(model.state_dict()), torch.randn(5, 3)
    f = spec(new).function
    expected = torch.sigmoid(f(model[2][0](f(model[0](x)))))
    assert swap_activation(model, new) is model
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    assert model.swapped_activation == new
    assert not any(module.training for module in model.modules())


def test_one_module_in_two_places_stays_one():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act, nn.Sequential(act))
    swap_activation(model, "silu")
    assert isinstance(model[1], nn.SiLU)
    assert model[1] is model[3] is model[4][0]


def test_nothing_to_swap_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Sigmoid())
    with pytest.raises(ValueError, match="no activation to replace in Sequential"):
        swap_activation(model, "relu")
    assert not hasattr(model, "swapped_activation")
    assert isinstance(model[1], nn.Identity)
    partial = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="unknown"):
        swap_activation(partial, "gleu")
    assert isinstance(partial[0], nn.ReLU)


@pytest.mark.parametrize("activation", ["gelu", "relu", nn.GELU()])
def test_torch_encoder_layers_lose_their_fused_activation(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    swap_activation(layer, "tanh")
    x = torch.randn(3, 5, 8)
    trained = layer.train()(x)
    with torch.no_grad():  # the fused path of eval mode knows ReLU and GELU only
        torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-4, atol=1e-5)


@pytest.fixture
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return BertModel(BertConfig(**size, hidden_act="gelu", initializer_range=1.0)).eval()


def rebuilt(model):
    """What a loader does: configuration, weights, and the swap that was noted."""
    new = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    new.load_state_dict(model.state_dict())
    return swap_activation(new, model.swapped_activation)


@pytest.mark.parametrize("first", ["tanh", "elu", "relu"])
@pytest.mark.parametrize("second", ["silu", "softplus", "gelu_tanh", "tanh"])
def test_bert_can_be_swapped_twice_and_rebuilt(bert, first, second):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = bert(ids).pooler_output
        for name in (first, second):
            swap_activation(bert, name)
            assert all(type(b.intermediate.intermediate_act_fn) is type(make(name)) for b in bert.encoder.layer)
            assert isinstance(bert.pooler.activation, nn.Tanh)
            output = bert(ids).pooler_output
            torch.testing.assert_close(rebuilt(bert)(ids).pooler_output, output)
    assert float((output - before).abs().max()) > 1e-6


def test_bert_config_follows_where_transformers_knows_the_name(bert):
    assert swap_activation(bert, "gelu_tanh").config.hidden_act == "gelu_pytorch_tanh"
    assert swap_activation(bert, "elu").config.hidden_act == "gelu_pytorch_tanh"
    assert swap_activation(bert, "relu").config.hidden_act == "relu"


def test_other_configurations_name_it_otherwise():
    from transformers import DistilBertConfig, DistilBertModel, GPT2Config, GPT2Model

    distil = DistilBertModel(DistilBertConfig(vocab_size=11, dim=8, n_layers=1, n_heads=2, hidden_dim=16))
    assert swap_activation(distil, "relu").config.activation == "relu"
    assert isinstance(distil.transformer.layer[0].ffn.activation, nn.ReLU)
    gpt = GPT2Model(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    assert swap_activation(nn.Sequential(gpt), "mish")[0].config.activation_function == "mish"
    assert isinstance(gpt.h[0].mlp.act, nn.Mish)


def test_every_key_and_class_of_transformers_in_the_table_exists():
    from transformers import activations as theirs

    for row in map(spec, EVERY):
        assert all(key in theirs.ACT2CLS for key in row.hub_keys)
        assert all(hasattr(theirs, cls) for cls in row.hub_classes)
        x = torch.linspace(-3, 3, 50)
        for key in row.hub_keys[:1]:
            torch.testing.assert_close(theirs.ACT2FN[key](x), row.function(x))
        for key in row.hub_keys:
            assert activations.kind_of(theirs.ACT2FN[key]) == row.name


def test_init_args_are_kept_true():
    from workbench.models import MLP

    model = swap_activation(MLP(4, [3], 2, activation="gelu"), "relu")
    assert model.init_args["activation"] == "relu"
    assert not hasattr(model, "swapped_activation")
    nested = swap_activation(nn.Sequential(MLP(4, [3], 2)), "silu")
    assert nested[0].init_args["activation"] == nested.swapped_activation == "silu"
