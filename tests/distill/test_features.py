"""Features: what is captured, when, and what is left behind."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distill.features import Features, capture, is_compiled, make_projector, matches
from tests.helpers.ranks import on_ranks
from workbench.models.wrappers import named_modules


class Block(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x))


class Net(nn.Module):
    """Three blocks, checkpointed if asked to, and a head."""

    def __init__(self, reentrant: bool | None = None, inplace: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(inplace) for _ in range(3))
        self.head, self.reentrant, self.skip = nn.Linear(4, 2), reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.skip and layer is self.layers[1]:
                continue
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.head(x)


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def by_hand(model: Net, x: Tensor) -> dict[str, Tensor]:
    """The same without calling any module, so without its hooks."""
    found = {}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        found[f"layers.{index}:input"] = x
        found[f"layers.{index}.linear"] = F.linear(x, layer.linear.weight, layer.linear.bias)
        x = x + torch.relu(found[f"layers.{index}.linear"])
        found[f"layers.{index}"] = x
    return {**found, "head:input": x, "head": F.linear(x, model.head.weight, model.head.bias)}


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    kinds = (*kinds, "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_inputs_and_outputs_by_path_in_module_order() -> None:
    model, x = net(), inputs()
    names = ["head", "layers.*:input", "layers.2:output", "layers.0.linear", "head:input"]
    with capture(model, names) as features:
        model(x)
        expected = by_hand(model, x)
        order = ["layers.0:input", "layers.0.linear", "layers.1:input", "layers.2:input", "layers.2"]
        assert list(features) == [*order, "head:input", "head"]
        assert len(features) == 7
        for name, tensor in features.items():
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(features["layers.2:output"], expected["layers.2"])
        assert "layers.2:output" in features
        assert "layers.0" not in features


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("*", ["layers", "head"]),
        ("layers.[!1]", ["layers.0", "layers.2"]),
        ("layers.[12].linear", ["layers.1.linear", "layers.2.linear"]),
        ("layers.?.act", ["layers.0.act", "layers.1.act", "layers.2.act"]),
        ("**.act", ["layers.0.act", "layers.1.act", "layers.2.act"]),
        ("layers.1**", ["layers.1", "layers.1.linear", "layers.1.act"]),
        ("layers?0", None),
        ("layers[!x]0", None),
        ("layers", ["layers"]),
    ],
)
def test_a_star_stops_at_dots_and_two_do_not(pattern: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="matches no submodule of Net"), capture(net(), pattern):
            pass
        return
    with capture(net(), pattern) as features:
        assert list(features) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.7", "near are .*layers.1"),
        ("heads", "near are .*head"),
        ("encoder.block.*", "near are layers, head"),
        ("module.layers.1", "say 'layers.1'"),
        ("head:inputs", "':input' or ':output' can be captured"),
        ("", "matches no submodule"),
    ],
)
def test_names_that_match_nothing(name: str, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message), capture(model, ["head", name]):
        pass
    assert hooks(model) == 0


def test_nothing_is_left_after_the_block() -> None:
    model = net()
    with capture(model, ["layers.*", "head:input"]) as features:
        assert hooks(model) > 0
        model(inputs())
    assert hooks(model) == 0
    assert dict(features) == {}
    with pytest.raises(KeyError, match="the capture has ended"):
        features["layers.0"]


def test_nothing_is_left_after_an_exception_in_forward() -> None:
    model, fused = net(), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capture(model, ["layers.*"]):
        model(torch.zeros(2, 5))
    assert hooks(model) == 0
    assert torch.backends.mha.get_fastpath_enabled() is fused


def test_a_forward_after_a_failed_one_starts_anew() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.*") as features:
        model(x)
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"'layers.0' was not called"):
            features["layers.0"]
        model(x)
        assert torch.equal(features["layers.0"], by_hand(model, x)["layers.0"])


def test_each_forward_refills_and_none_is_stale() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.*") as features:
        with pytest.raises(ValueError, match=r"'layers.0' was not called"):
            dict(features)
        model(x)
        model(x + 1)
        assert torch.equal(features["layers.1"], by_hand(model, x + 1)["layers.1"])
        model.skip = True
        model(x)
        assert torch.equal(features["layers.0"], by_hand(model, x)["layers.0"])
        with pytest.raises(ValueError, match=r"'layers.1' was not called.*run the model inside"):
            features["layers.1"]
        with pytest.raises(KeyError, match="'head' is not captured"):
            features["head"]


def test_take_empties() -> None:
    model, x = net(), inputs()
    with capture(model, ["head", "layers.0"]) as features:
        model(x)
        taken = features.take()
        assert list(taken) == ["layers.0", "head"]
        with pytest.raises(ValueError, match="was not called"):
            features.take()


def test_a_module_called_twice_is_named() -> None:
    model = net()
    model.layers[2] = model.layers[0]
    with capture(model, ["layers.*"]) as features:
        model(inputs())
        assert features["layers.1"].shape == (3, 4)
        with pytest.raises(ValueError, match=r"'layers.0' was called 2 times in one forward"):
            features["layers.0"]
        with pytest.raises(ValueError, match=r"'layers.2' was called 2 times"):
            features["layers.2"]


def test_parts_called_by_hand_keep_their_last_call() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.0") as features:
        model.layers[0](x)
        model.layers[0](x + 1)
        assert torch.equal(features["layers.0"], by_hand(model, x + 1)["layers.0"])
        model(x)
        assert torch.equal(features["layers.0"], by_hand(model, x)["layers.0"])
        model.layers[0](x + 1)
        assert torch.equal(features["layers.0"], by_hand(model, x + 1)["layers.0"])


def test_gradients_flow_through_features() -> None:
    model, x = net(), inputs()
    with capture(model, ["layers.1", "layers.2:input"]) as features:
        model(x)
        (features["layers.1"].square().sum() + features["layers.2:input"].sum()).backward()
    twin = net()
    feature = by_hand(twin, x)["layers.1"]
    (feature.square().sum() + feature.sum()).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name.startswith(("layers.0", "layers.1")):
            assert p.grad is not None
            assert torch.allclose(p.grad, q.grad), name  # type: ignore[arg-type]
        else:
            assert p.grad is None


class Odd(nn.Module):
    """Returns whatever it was made with, and gives its parts their inputs by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Returns()

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.part(**kwargs) if kwargs else self.part((None, x), hidden_states=x + 1)


class Returns(nn.Module):
    result: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result


def test_the_first_tensor_of_what_is_returned() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model, x = Odd(), inputs()
    output = BaseModelOutput(last_hidden_state=x, hidden_states=(x + 1,))  # type: ignore[arg-type]
    with capture(model, "part") as features:
        for result in (x, (x, x + 1), [None, (x,)], {"a": "text", "b": x}, output):
            model.part.result = result
            model(x)
            assert features["part"] is x
        model.part.result = {"text": "none"}
        model(x)
        with pytest.raises(ValueError, match="'part' has no tensor there"):
            features["part"]


def test_the_first_tensor_of_what_is_given() -> None:
    model, x = Odd(), inputs()
    with capture(model, "part:input") as features:
        model(x)
        assert features["part:input"] is x
        model(x, mask=x + 1, hidden_states=x)
        assert features["part:input"] is x
        model(x, other=x)
        assert features["part:input"] is x


def test_values_changed_in_place_are_refused_or_kept() -> None:
    model, x = net(inplace=True), inputs()
    with capture(model, ["layers.0.linear", "layers.0"]) as features:
        model(x)
        assert torch.equal(features["layers.0"], by_hand(model, x)["layers.0"])
        with pytest.raises(ValueError, match=r"'layers.0.linear' was changed in place.*clone=True"):
            features["layers.0.linear"]
    with capture(model, ["layers.0.linear"], clone=True) as features:
        model(x)
        assert torch.equal(features["layers.0.linear"], by_hand(model, x)["layers.0.linear"])
        features["layers.0.linear"].sum().backward()
    assert model.layers[0].linear.weight.grad is not None  # type: ignore[union-attr]


def test_inference_mode_and_no_grad() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.1") as features:
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                model(x)
                assert torch.equal(features["layers.1"], by_hand(model, x)["layers.1"])
                assert not features["layers.1"].requires_grad


def test_two_captures_of_one_model() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.*") as outer:
        with capture(model, ["layers.1", "head"]) as inner:
            model(x)
            assert inner["layers.1"] is outer["layers.1"]
        assert len(inner) == 0
        assert torch.equal(outer["layers.1"], by_hand(model, x)["layers.1"])
        assert not torch.backends.mha.get_fastpath_enabled()
        model(x + 1)
        assert torch.equal(outer["layers.1"], by_hand(model, x + 1)["layers.1"])
    assert hooks(model) == 0


def test_no_names_change_nothing() -> None:
    model = net()
    with capture(model, []) as features:
        assert hooks(model) == 0
        assert torch.backends.mha.get_fastpath_enabled()
        assert features.take() == {}


def test_a_copy_of_the_model_does_not_write_here() -> None:
    model, x = net(), inputs()
    with capture(model, "layers.1") as features:
        model(x)
        twin = copy.deepcopy(model)
        twin(x + 1)
        assert torch.equal(features["layers.1"], by_hand(model, x)["layers.1"])
        assert dict(copy.deepcopy(features)) == {}
        assert isinstance(copy.copy(features), Features)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_fused_encoder_is_seen_through(pooled: bool) -> None:
    """Pitfall 11: in eval without a graph torch runs a fused kernel that calls no submodule."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=pooled).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 4 + [True]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        fused = model(x, src_key_padding_mask=padding)
    with torch.no_grad(), capture(model, ["layers.*", "layers.1:input", "layers.*.linear1"]) as features:
        output = model(x, src_key_padding_mask=padding)
        assert features["layers.1"].shape == (3, 5, 8)
        assert not features["layers.1"].is_nested
        assert features["layers.0.linear1"].shape == (3, 5, 16)
        assert torch.equal(features["layers.1"], output)
        assert torch.equal(features["layers.1:input"], features["layers.0"])
    assert torch.allclose(output[~padding], fused[~padding], atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch's own tracing
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", ["wrapped", "in place", "a part", "a function"])
def test_a_compiled_model(how: str, called: bool) -> None:
    """By default compiled code does not notice hooks that came after it."""
    torch.compiler.reset()
    plain, x = net(), inputs()
    model: Any = net()
    if how == "wrapped":
        run = model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
        run = model
    elif how == "a part":
        model.layers[1] = torch.compile(model.layers[1], backend="eager")
        run = model
    else:
        run = torch.compile(lambda x: model(x), backend="eager")
    if called:
        run(x)
    with capture(model, ["layers.*", "layers.1.linear", "head:input"]) as features:
        for shift in (0, 1):
            output = run(x + shift)
            expected = by_hand(plain, x + shift)
            assert list(features) == ["layers.0", "layers.1", "layers.1.linear", "layers.2", "head:input"]
            for name, tensor in features.items():
                assert torch.allclose(tensor, expected[name]), name
            assert torch.allclose(output, expected["head"])
        features["layers.1"].sum().backward()
    assert hooks(model) == 0
    assert torch.allclose(run(x), by_hand(plain, x)["head"])
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_recomputation_in_backward_changes_nothing() -> None:
    model, x = net(reentrant=False), inputs()
    with capture(model, ["layers.*", "layers.1.linear"]) as features:
        output = model(x)
        seen = dict(features)
        (features["layers.1"].square().sum() + features["layers.1.linear"].sum() + output.sum()).backward()
        assert all(features[name] is tensor for name, tensor in seen.items())
    twin = net()
    with capture(twin, ["layers.*", "layers.1.linear"]) as features:
        output = twin(x)
        (features["layers.1"].square().sum() + features["layers.1.linear"].sum() + output.sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_has_no_graph_to_give() -> None:
    model, x = net(reentrant=True), inputs().requires_grad_()
    with capture(model, "layers.0.linear"), pytest.raises(ValueError, match="use_reentrant=False"):
        model(x)
    with capture(model, "layers.0.linear") as features, torch.no_grad():
        model(x)
        assert torch.equal(features["layers.0.linear"], by_hand(model, x)["layers.0.linear"])
    with capture(model, "head:input") as features:
        output = model(x)
        seen = features["head:input"]
        (output.sum() + seen.sum()).backward()
        assert features["head:input"] is seen


def test_what_is_no_module_or_runs_copies_is_refused() -> None:
    with pytest.raises(ValueError, match="function is none"), capture(lambda x: x, "layers"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="use DistributedDataParallel"), capture(nn.DataParallel(net()), "head"):
        pass


def _gradients() -> list[Any]:
    torch.distributed.init_process_group("gloo")
    rank, model = torch.distributed.get_rank(), DistributedDataParallel(net())
    with capture(model, ["layers.1", "head:input"]) as features:
        output = model(inputs(4)[2 * rank : 2 * rank + 2])
        (features["layers.1"].square().mean() + features["head:input"].mean() + output.square().mean()).backward()
    return [p.grad.tolist() for p in model.parameters() if p.grad is not None]


def test_two_ranks_get_the_gradient_of_the_whole_batch() -> None:
    """Pitfall 10: the forward goes through the wrapper, the names are of the model inside."""
    first, second = on_ranks(_gradients)
    assert first == second
    whole = net()
    found = by_hand(whole, inputs(4))
    (found["layers.1"].square().mean() + found["head:input"].mean() + found["head"].square().mean()).backward()
    expected = [p.grad for p in whole.parameters() if p.grad is not None]
    assert len(first) == len(expected) == 8
    for gradient, other in zip(first, expected):
        assert torch.allclose(torch.tensor(gradient), other, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "bias"),
    [
        ((2, 4), (2, 6), nn.Linear, True),
        ((2, 5, 4), (2, 5, 6), nn.Linear, True),
        ((2, 4, 8, 8), (2, 6, 8, 8), nn.Conv2d, True),
        ((2, 4), (2, 4), nn.Identity, None),
        ((2, 4, 8, 8), (2, 4, 8, 8), nn.Identity, None),
        ((2, 4, 8, 8), (2, 4, 4, 3), nn.AdaptiveAvgPool2d, None),
        ((2, 4, 8, 8), (2, 6, 4, 3), nn.Sequential, None),
        ((2, 4, 4, 4), (2, 6, 8, 8), nn.Sequential, None),
    ],
)
def test_projectors(student: tuple[int, ...], teacher: tuple[int, ...], kind: type, bias: bool | None) -> None:
    x, y = torch.randn(student), torch.randn(teacher)
    projector = make_projector(x, y)
    assert type(projector) is kind
    assert projector(x).shape == y.shape
    if bias:
        assert projector.bias is not None


def test_a_projector_pools_before_it_mixes_channels() -> None:
    x, y = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    projector: Any = make_projector(x, y)
    pooled = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    expected = torch.einsum("bchw,oc->bohw", pooled, projector[1].weight[:, :, 0, 0])
    assert torch.allclose(projector(x), expected + projector[1].bias[:, None, None], atol=1e-6)


def test_a_projector_has_the_precision_that_trains() -> None:
    low = torch.randn(2, 4).bfloat16()
    assert next(make_projector(low, torch.randn(2, 6)).parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert next(make_projector(low, torch.randn(2, 6)).parameters()).dtype == torch.float32
    assert next(make_projector(low.double(), low[:, :1]).parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 4), (2, 5, 4)), ((2, 5, 4), (2, 6, 4)), ((2, 4), (3, 4)), ((4,), (4,)), ((2, 4, 4, 4), (3, 4, 4, 4))],
)
def test_shapes_that_no_projector_fits(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="both are to be"):
        make_projector(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    ("name", "place", "fits"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "layers.*", True),
        ("layers.1", "layers.1:output", True),
        ("layers.1:input", "layers.*:input", True),
        ("layers.1:input", "layers.*", False),
        ("layers.1", "layers.*:input", False),
        ("layers.1.norm", "layers.*", False),
        ("layers.1.norm", "layers.**", True),
        ("layers.10", "layers.?", False),
    ],
)
def test_which_names_a_place_stands_for(name: str, place: str, fits: bool) -> None:
    assert matches(name, place) == fits


def test_what_was_compiled_is_known() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert not is_compiled(network())
    assert is_compiled(torch.compile(network(), backend="eager"))  # type: ignore[arg-type]
    in_place, part, method = network(), network(), network()
    in_place[0].compile(backend="eager")  # type: ignore[index]
    part[0] = torch.compile(part[0], backend="eager")  # type: ignore[index,operator]
    method.forward = torch.compile(method.forward, backend="eager")  # type: ignore[method-assign]
    assert all(map(is_compiled, (in_place, part, method)))


def test_modules_are_listed_once_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts of fused layers are captured."""
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=4, n_head=2, n_positions=4))
    walks = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        walks.append(args)
        return named_modules(*args, **kwargs)

    monkeypatch.setattr("distill.features.named_modules", counted)
    with capture(model, "h.*.attn.c_attn:query") as features:
        model(torch.tensor([[1, 2, 3]]))
        assert [features[f"h.{layer}.attn.c_attn:query"].shape for layer in range(4)] == [(1, 3, 4)] * 4
    assert len(walks) == 1
