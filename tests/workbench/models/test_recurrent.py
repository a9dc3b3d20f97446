import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prune import Pruner
from workbench.models import Recurrent, RecurrentStack, RecurrentTokens
from workbench.models.activations import gain, spec, swap_activation
from workbench.models.recurrent import RecurrentLayer
from workbench.tasks import Classification, LanguageModelling

CELLS = ["rnn", "gru", "lstm"]
TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def noisy(model):
    """Biases and scales other than those at the start, in float64."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def torchs(stack, **options):
    """Torch's own module with the weights of ours."""
    arguments = stack.init_args
    both = arguments["bidirectional"]
    other = TORCH[arguments["cell"]](
        arguments["features"],
        arguments["hidden"],
        arguments["layers"],
        batch_first=True,
        bidirectional=both,
        **options,
    ).double()
    with torch.no_grad():
        for depth, reverse in product(range(arguments["layers"]), (False, True) if both else (False,)):
            layer = (stack.backwards if reverse else stack.forwards)[depth]
            for short, linear in (("ih", layer.input), ("hh", layer.recurrent)):
                name = f"{short}_l{depth}" + "_reverse" * reverse
                getattr(other, f"weight_{name}").copy_(linear.weight)
                getattr(other, f"bias_{name}").copy_(linear.bias)
    return other


def last_of(ends, both):
    """The last layer's last states, out of torch's [layers * directions, B, H]."""
    return torch.cat(list(ends[-2:] if both else ends[-1:]), -1)


@pytest.mark.parametrize(("cell", "layers", "both"), [(c, *rest) for c in CELLS for rest in ((1, False), (2, True))])
def test_with_tanh_it_is_torchs(cell, layers, both):
    torch.manual_seed(0)
    stack = noisy(RecurrentStack(3, 5, layers, cell, bidirectional=both))
    x = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    states, last = stack(x)
    expected, ends = torchs(stack)(x)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(last, last_of(ends[0] if cell == "lstm" else ends, both))
    (grad,) = torch.autograd.grad(states.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])


def test_with_relu_it_is_torchs():
    torch.manual_seed(0)
    stack = noisy(RecurrentStack(3, 5, 2, "rnn", "relu"))
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(stack(x)[0], torchs(stack, nonlinearity="relu")(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_what_torch_makes_of_packed_sequences(cell):
    torch.manual_seed(0)
    stack = noisy(RecurrentStack(3, 4, 2, cell, bidirectional=True))
    x, lengths = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([6, 1, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    states, last = stack(x, mask)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, ends = torchs(stack)(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    torch.testing.assert_close(states[mask], expected[mask])
    torch.testing.assert_close(last, last_of(ends[0] if cell == "lstm" else ends, True))


def naive(layer, cell, f, x):
    """One layer over one sequence [L, F], a unit at a time from the equations in the steps' docstrings."""
    units = layer.recurrent.in_features

    def maps(linear, vector, norm):
        found = [
            sum(float(w) * v for w, v in zip(row, vector)) + (0.0 if linear.bias is None else float(linear.bias[index]))
            for index, row in enumerate(linear.weight)
        ]
        return normed(found, norm)

    def normed(values, norm):
        if isinstance(norm, nn.Identity):
            return values
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + norm.eps)
        return [(v - mean) / deviation * float(w) + float(b) for v, w, b in zip(values, norm.weight, norm.bias)]

    def act(value):
        return float(spec(f).function(torch.tensor(value, dtype=torch.float64)))

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    h, c, states = [0.0] * units, [0.0] * units, []
    for row in x.tolist():
        read, recalled = maps(layer.input, row, layer.input_norm), maps(layer.recurrent, h, layer.recurrent_norm)
        both = [one + other for one, other in zip(read, recalled)]
        if cell == "rnn":
            h = [act(value) for value in both]
        elif cell == "gru":
            r = [sigmoid(value) for value in both[:units]]
            z = [sigmoid(value) for value in both[units : 2 * units]]
            n = [act(read[2 * units + i] + r[i] * recalled[2 * units + i]) for i in range(units)]
            h = [(1 - z[i]) * n[i] + z[i] * h[i] for i in range(units)]
        else:
            into, forget, candidate, out = (both[gate * units : (gate + 1) * units] for gate in range(4))
            c = [sigmoid(forget[i]) * c[i] + sigmoid(into[i]) * act(candidate[i]) for i in range(units)]
            h = [sigmoid(o) * act(value) for o, value in zip(out, normed(c, layer.cell_norm))]
        states.append(h)
    return torch.tensor(states, dtype=torch.float64)


@pytest.mark.parametrize(("cell", "f", "norm"), [*product(CELLS, ["gelu", "silu"], ["none", "layer"])])
def test_any_activation_and_norm_by_the_equations(cell, f, norm):
    torch.manual_seed(0)
    layer = noisy(RecurrentLayer(2, 3, cell, f, norm)).requires_grad_(False)
    x = torch.randn(2, 4, 2, dtype=torch.float64)
    states, last = layer(x)
    torch.testing.assert_close(states, torch.stack([naive(layer, cell, f, sequence) for sequence in x]))
    assert torch.equal(last, states[:, -1])


# --- padding


@pytest.mark.parametrize(("cell", "norm"), [("rnn", "none"), ("gru", "layer"), ("lstm", "layer"), ("lstm", "none")])
def test_padded_steps_change_nothing(cell, norm):
    """On the right, on the left and between, whatever stands there; nor do they change a gradient."""
    torch.manual_seed(0)
    stack = noisy(RecurrentStack(2, 3, 2, cell, "gelu", True, norm))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    x[mask == 0] = float("nan")
    states, last = stack(x, mask)
    assert states.isfinite().all()
    (states[mask != 0].square().sum() + last.square().sum()).backward()
    found = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    for sequence, kept, row, end in zip(x, mask != 0, states, last):
        alone, alone_end = stack(sequence[kept][None])
        torch.testing.assert_close(row[kept], alone[0])
        torch.testing.assert_close(end, alone_end[0])
        (alone.square().sum() + alone_end.square().sum()).backward()
    for grad, parameter in zip(found, stack.parameters()):
        torch.testing.assert_close(grad, parameter.grad)


def test_a_sequence_of_padding_ends_where_it_began():
    stack = RecurrentStack(2, 3)
    states, last = stack(torch.randn(2, 4, 2), torch.zeros(2, 4))
    assert not states.any()
    assert not last.any()


def test_lengths_are_a_mask():
    torch.manual_seed(0)
    model = Recurrent(2, 3, cell="lstm", bidirectional=True)
    x, lengths = torch.randn(3, 5, 2), torch.tensor([5, 2, 3])
    mask = torch.arange(5) < lengths[:, None]
    assert torch.equal(model(x, lengths), model(x, attention_mask=mask.long()))
    assert torch.equal(model(x, torch.full((3,), 5)), model(x))
    assert not torch.allclose(model(x, lengths), model(x))


# --- heads


def test_a_horizon_is_told_step_by_step():
    torch.manual_seed(0)
    model = Recurrent(2, 3, horizon=4)
    x = torch.randn(5, 6, 2)
    found = model(x)
    assert found.shape == (5, 4, 3)
    last = model.stack(x)[1]
    assert torch.equal(found[:, 1, 2], model.head(last)[:, 1 * 3 + 2])
    assert Recurrent(2, 3, horizon=1)(x).shape == (5, 1, 3)
    assert Recurrent(2, 3)(x).shape == (5, 3)


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_sees_the_past_only(cell):
    torch.manual_seed(0)
    model = RecurrentTokens(11, embedding=4, hidden=5, layers=2, cell=cell).eval()
    ids = torch.randint(0, 11, (3, 6))
    logits = model(input_ids=ids)
    assert logits.shape == (3, 6, 11)
    other = ids.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    changed = (model(other) - logits).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 2


def test_tokens_are_learnt_by_the_tasks():
    """The next token of a cycle, and which of two cycles it is, from batches padded on either side."""
    torch.manual_seed(0)
    step = torch.tensor([[1], [2]]).repeat(8, 1)
    ids = (torch.arange(16)[:, None] + step * torch.arange(9)) % 7
    mask = torch.ones_like(ids)
    mask[::4, 5:], mask[1::4, :3] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    for task, model in (
        (LanguageModelling(7), RecurrentTokens(7, None, 8, 24, activation="gelu")),
        (Classification(2), RecurrentTokens(7, 2, 8, 24, activation="silu", bidirectional=True)),
    ):
        given = batch if isinstance(task, LanguageModelling) else {**batch, "labels": step[:, 0] - 1}
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(40):
            args, kwargs = task.inputs(given)
            loss = task.loss(task.output(model(*args, **kwargs)), given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("cell", "f"), [("rnn", "relu"), ("rnn", "tanh"), ("gru", "gelu"), ("lstm", "mish")])
def test_what_came_first_is_remembered(cell, f):
    """The sign of the first of 12 steps, by heart."""
    torch.manual_seed(0)
    x = torch.randn(32, 12, 1)
    y = (x[:, 0, 0] > 0).long()
    model = Recurrent(1, 2, None, 24, cell=cell, activation=f, norm="layer")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9


# --- what others do with it


@pytest.mark.parametrize("cell", CELLS)
def test_every_matrix_is_prunable(cell):
    torch.manual_seed(0)
    model = RecurrentTokens(20, 3, 8, 6, 2, cell, bidirectional=True, norm="layer")
    masks = Pruner()(model, density=0.2)
    maps = [
        f"stack.{way}.{depth}.{part}.weight"
        for way in ("forwards", "backwards")
        for depth in (0, 1)
        for part in ("input", "recurrent")
    ]
    assert set(masks) == {*maps, "head.weight"}
    masks.apply(model)
    ids = torch.randint(0, 20, (4, 5))
    model(ids).square().sum().backward()
    weight, kept = model.stack.forwards[1].recurrent.weight, masks["stack.forwards.1.recurrent.weight"]
    assert torch.equal(weight != 0, kept)


def test_hooks_see_every_step():
    model = Recurrent(2, 3, hidden=4)
    layer, seen = model.stack.forwards[0], []
    for module in (layer.input, layer.recurrent, layer.activation):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model(torch.randn(2, 5, 2))
    assert seen == ["Linear", *["Linear", "Tanh"] * 5]


def test_the_activation_is_swapped_in_every_layer():
    model = swap_activation(Recurrent(2, 3, hidden=4, layers=2, cell="lstm"), "gelu")
    assert model.init_args["activation"] == model.stack.init_args["activation"] == "gelu"
    torch.manual_seed(0)
    other = Recurrent(2, 3, hidden=4, layers=2, cell="lstm", activation="gelu")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 2)
    assert torch.equal(model(x), other(x))


def test_it_is_traced_for_any_batch():
    model = Recurrent(2, 3, hidden=4, layers=2, cell="lstm", bidirectional=True).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(model, (torch.randn(2, 3, 2), torch.tensor([3, 2])), dynamic_shapes=dynamic)
    x, lengths = torch.randn(7, 3, 2), torch.arange(7).clamp(1, 3)
    torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))


# --- initial weights


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_matrices_are_orthogonal_gate_by_gate(cell):
    for layer in RecurrentStack(3, 6, 2, cell, bidirectional=True).modules():
        if isinstance(layer, RecurrentLayer):
            blocks = layer.recurrent.weight.detach().unflatten(0, (GATES[cell], 6))
            torch.testing.assert_close(blocks @ blocks.mT, torch.eye(6).expand_as(blocks), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("init", "first", "second"), [("own", 1.0, gain("gelu")), ("he", 2**0.5, 2**0.5)])
def test_input_matrices_have_the_gain_of_what_they_read(init, first, second):
    torch.manual_seed(0)
    model = Recurrent(100, 200, hidden=200, layers=2, activation="gelu", bidirectional=True, init=init)
    deviations = [
        float(layer.input.weight.detach().std() * layer.input.in_features**0.5)
        for layer in (*model.stack.forwards, *model.stack.backwards)
    ]
    assert deviations == pytest.approx([first, second] * 2, rel=0.02)
    assert float(model.head.weight.detach().std() * 20) == pytest.approx(1, rel=0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_an_lstm_begins_by_not_forgetting(norm):
    layer = RecurrentStack(3, 4, cell="lstm", norm=norm).forwards[0]
    bias = layer.input.bias if norm == "none" else layer.input_norm.bias
    assert bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8


def test_from_the_identity_a_relu_remembers():
    """Le et al. 2015: U = I, biases 0, input weights N(0, 0.001^2)."""
    torch.manual_seed(0)
    stack = RecurrentStack(50, 40, 2, "rnn", "relu", recurrence="identity")
    for layer in stack.forwards:
        assert torch.equal(layer.recurrent.weight, torch.eye(40))
    assert float(stack.forwards[0].input.weight.detach().std()) == pytest.approx(1e-3, rel=0.1)
    assert float(stack.forwards[1].input.weight.detach().std()) == pytest.approx(gain("relu") / 40**0.5, rel=0.1)
    x = torch.zeros(1, 9, 50)
    x[0, 0] = 1
    states = stack.forwards[0](x)[0]
    assert states.any()
    assert torch.equal(states[0, 0], states[0, 8])


def test_one_seed_one_network_up_to_its_gains():
    def weights(activation):
        torch.manual_seed(3)
        return Recurrent(2, 3, hidden=4, activation=activation).state_dict()

    one, other = weights("tanh"), weights("gelu")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (RecurrentStack, {"features": 0}, "features=0"),
        (RecurrentStack, {"hidden": 0}, "hidden=0"),
        (RecurrentStack, {"layers": 0}, "layers=0"),
        (RecurrentStack, {"cell": "RNN"}, "cell='RNN': use one of rnn, gru, lstm"),
        (RecurrentStack, {"norm": "batch"}, "norm='batch': use one of none, layer"),
        (RecurrentStack, {"init": "x"}, "init='x': use one of own, he"),
        (RecurrentStack, {"recurrence": "x"}, "recurrence='x': use one of orthogonal, identity"),
        (RecurrentStack, {"recurrence": "identity"}, "recurrence='identity' with cell='gru': it is for cell='rnn'"),
        (RecurrentStack, {"dropout": 1.0}, r"dropout=1\.0"),
        (RecurrentStack, {"activation": "gleu"}, "Did you mean .*'gelu'"),
        (Recurrent, {"outputs": 0}, "outputs=0"),
        (Recurrent, {"horizon": 0}, "horizon=0"),
        (RecurrentTokens, {"vocabulary": 0}, "vocabulary=0"),
        (RecurrentTokens, {"vocabulary": 5, "classes": 0}, "classes=0"),
        (RecurrentTokens, {"vocabulary": 5, "embedding": 0}, "embedding=0"),
        (RecurrentTokens, {"vocabulary": 5, "bidirectional": True}, "would see what it predicts"),
    ],
)
def test_wrong_arguments_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_wrong_inputs_are_named():
    model = Recurrent(2, 3)
    x = torch.randn(4, 5, 2)
    with pytest.raises(ValueError, match=r"the sequences are \[4, 5\]: give \[B, L, 2\]"):
        model(x[..., 0])
    with pytest.raises(ValueError, match=r"\[4, 5, 1\]: give \[B, L, 2\]"):
        model(x[..., :1])
    with pytest.raises(ValueError, match=r"\[4, 0, 2\]: .* L >= 1"):
        model(x[:, :0])
    with pytest.raises(ValueError, match=r"lengths is \[3\] for sequences \[4, 5, 2\]"):
        model(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"attention_mask is \[4, 4\] for sequences \[4, 5, 2\]"):
        model(x, attention_mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="give one of them"):
        model(x, torch.ones(4), torch.ones(4, 5))


def test_dropout_is_between_layers_in_training_only():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 2)
    for layers, random in ((1, False), (2, True)):
        stack = RecurrentStack(2, 8, layers, dropout=0.5)
        assert torch.equal(stack(x)[0], stack(x)[0]) != random
        stack.eval()
        assert torch.equal(stack(x)[0], stack(x)[0])
