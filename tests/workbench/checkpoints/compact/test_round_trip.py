import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.compact_checkpoints import Given, Odd, Plain, assert_same_state, bert, magnitude, names, same
from workbench import load, save, swap_activation
from workbench.checkpoints import compact
from workbench.models import MLP, Conv, DenseNet, LeNet5, Recurrent, RecurrentTokens, Transformer


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.init_args = {"tied": tied}
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        if tied:
            self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "mlp": (lambda: MLP(16, (24, 24), 5), lambda: (torch.randn(3, 16),)),
    "mlp relu": (lambda: MLP(16, (24,), 5, activation="relu"), lambda: (torch.randn(3, 16),)),
    "mlp batch norm": (lambda: MLP(16, (24,), 5, norm="batch"), lambda: (torch.randn(3, 16),)),
    "lenet": (lambda: LeNet5(image_size=8), lambda: (torch.randn(3, 1, 8, 8),)),
    "conv": (lambda: Conv(4, 4, 8, image_size=8, norm="batch"), lambda: (torch.randn(3, 3, 8, 8),)),
    "densenet": (lambda: DenseNet(10, 4, True, 0.5), lambda: (torch.randn(3, 3, 8, 8),)),
    "rnn": (lambda: Recurrent(4, 5, cell="rnn", horizon=2), lambda: (torch.randn(3, 6, 4),)),
    "gru": (lambda: swap_activation(Recurrent(4, 5, norm="layer"), "gelu"), lambda: (torch.randn(3, 6, 4),)),
    "lstm": (lambda: RecurrentTokens(40, 5, bidirectional=True), lambda: (torch.randint(0, 40, (3, 7)),)),
    "float64": (lambda: MLP(16, (24,), 5).double(), lambda: (torch.randn(3, 16).double(),)),
    "bfloat16": (lambda: MLP(16, (24,), 5, norm="layer").bfloat16(), lambda: (torch.randn(3, 16).bfloat16(),)),
    "float16": (lambda: MLP(16, (24,), 5).half(), lambda: (torch.randn(3, 16).half(),)),
    "swapped mlp": (lambda: swap_activation(MLP(16, (24,), 5), "tanh"), lambda: (torch.randn(3, 16),)),
    "transformer": (
        lambda: Transformer(40, width=16, heads=2, width_ffn=24, activation="swiglu", causal=True, tied=True),
        lambda: (torch.randint(0, 40, (3, 7)),),
    ),
    "tied": (Tied, lambda: (torch.randn(3, 8),)),
    "untied": (lambda: Tied(False), lambda: (torch.randn(3, 8),)),
    "bert": (bert, lambda: (torch.randint(0, 40, (3, 7)),)),
    "bert eager": (lambda: bert(attn_implementation="eager"), lambda: (torch.randint(0, 40, (3, 7)),)),
    "bert swapped": (lambda: swap_activation(bert(), "relu"), lambda: (torch.randint(0, 40, (3, 7)),)),
    "bert swapped beyond transformers": (
        lambda: swap_activation(bert(), "softplus"),
        lambda: (torch.randint(0, 40, (3, 7)),),
    ),
    "user's lightning module": (lambda: Given(6, activation="tanh"), lambda: (torch.randn(3, 4),)),
    "user's, swapped": (lambda: swap_activation(Given(6), "silu"), lambda: (torch.randn(3, 4),)),
    "plain": (Plain, lambda: (torch.randn(3, 4),)),
    "plain swapped": (lambda: swap_activation(Plain(), "gelu"), lambda: (torch.randn(3, 4),)),
}


def logits(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        raw = model.eval()(*inputs)
    return raw if isinstance(raw, Tensor) else raw.logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    make, example = MODELS[name]
    model, inputs = make(), example()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    masks = magnitude(model, 0.3)
    expected = logits(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save(model, tmp_path / "a", masks, provenance={"why": "test"})
    assert all(same(value, before[key]) for key, value in model.state_dict().items()), "saving changes nothing"
    back = load(tmp_path / "a")
    assert type(back) is type(model)
    assert not any(module.training for module in back.modules())
    assert_same_state(model, back)
    assert same(logits(back, inputs), expected)
    assert {key: value.tolist() for key, value in compact.masks(tmp_path / "a").items()} == {
        key: value.tolist() for key, value in masks.items()
    }
    save(back, tmp_path / "b", masks)
    again = load(tmp_path / "b")
    assert_same_state(again, model)
    assert same(logits(again, inputs), expected), "and so does what came back, saved again"


def test_everything_a_state_may_hold(tmp_path: Path) -> None:
    model = Odd()
    masks = {"scale": torch.tensor(True), "empty": torch.zeros(0, 3, dtype=torch.bool)}
    masks |= {name: mask for name, mask in magnitude(model, 0.2).items() if name != "empty"}
    save(model, tmp_path, masks)
    assert_same_state(load(tmp_path), model)
    assert_same_state(load(tmp_path, model=Odd()), model)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_any_tensor_round_trips(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    # Any pattern of bits: NaNs of every kind, infinities, denormals, negative zero.
    bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(bits.view(dtype).view(shape)))
    masks = {"x": torch.rand(shape, generator=generator) < 0.5} if masked else {}
    for mask in masks.values():
        model.x.data.masked_fill_(~mask, -0.0)  # type: ignore[union-attr]
    path = save(model, tmp_path_factory.mktemp("x"), masks)
    back = compact.tensors(path)["x"]
    expected = model.x.detach()
    for mask in masks.values():
        expected = expected.masked_fill(~mask, 0)
    assert same(back, expected), "a pruned -0.0 comes back as +0.0"


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    save(model, tmp_path / "tied")
    save(Tied(False), tmp_path / "untied")
    entries = compact.read_index(tmp_path / "tied")["tensors"]
    assert entries["other.weight"] == {"alias": "one.weight"}
    assert size(tmp_path / "untied") - size(tmp_path / "tied") > 8 * 8 * 4
    state = compact.tensors(tmp_path / "tied")
    assert state["one.weight"] is state["other.weight"]
    back = load(tmp_path / "tied")
    assert back.one.weight is back.other.weight


def test_a_mask_may_go_by_any_name_of_a_tied_weight(tmp_path: Path) -> None:
    model = Tied()
    mask = magnitude(model, 0.2)["one.weight"]
    save(model, tmp_path, {"other.weight": mask})
    assert list(compact.masks(tmp_path)) == ["one.weight"]
    save(model, tmp_path, {"other.weight": mask, "one.weight": mask})
    with pytest.raises(ValueError, match="one tied weight with two masks"):
        save(model, tmp_path, {"other.weight": mask, "one.weight": torch.ones_like(mask)})


def test_two_parameters_over_one_memory_are_one_weight(tmp_path: Path) -> None:
    model = Tied(False)
    model.other.weight.data = model.one.weight.data
    mask = magnitude(model, 0.2)["other.weight"]
    save(model, tmp_path, {"other.weight": mask})
    assert list(compact.masks(tmp_path)) == ["one.weight"]
    assert_same_state(load(tmp_path), model)


@pytest.mark.gpu
def test_from_and_to_another_device(tmp_path: Path) -> None:
    model = Tied().cuda()
    masks = magnitude(model.cpu(), 0.3)
    save(model.cuda(), tmp_path, {name: mask.cuda() for name, mask in masks.items()})
    assert compact.read_index(tmp_path)["tensors"]["other.weight"] == {"alias": "one.weight"}
    back = load(tmp_path, map_location="cuda")
    assert {parameter.device.type for parameter in back.parameters()} == {"cuda"}
    assert_same_state(back.cpu(), model.cpu())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_language_model_with_and_without_tied_embeddings(tmp_path: Path, kind: str) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        tie_word_embeddings=kind == "tied",
    )
    model = BertForMaskedLM(config)
    masks = magnitude(model, 0.5)
    tokens = torch.randint(0, 40, (2, 5))
    expected = logits(model, (tokens,))
    save(model, tmp_path, masks)
    aliases = [entry for entry in compact.read_index(tmp_path)["tensors"].values() if "alias" in entry]
    assert bool(aliases) == (kind == "tied")
    back = load(tmp_path)
    assert_same_state(back, model)
    assert same(logits(back, (tokens,)), expected)


def test_an_untied_checkpoint_is_not_poured_into_a_tied_model(tmp_path: Path) -> None:
    save(Tied(False), tmp_path)
    with pytest.raises(ValueError, match=r"did not load .* as stored; does it tie weights"):
        load(tmp_path, model=Tied())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_fewer_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = MLP(16, (24,), 5, norm="batch")
    model.layers[1].running_var.fill_(1e-9)
    masks = magnitude(model, 0.5)
    save(model, tmp_path / "narrow", masks, dtype)
    save(model, tmp_path / "full", masks)
    back = load(tmp_path / "narrow").state_dict()
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        expected = tensor.to(dtype).to(tensor.dtype) if name in parameters else tensor
        assert same(back[name], expected), name
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert size(tmp_path / "full") - size(tmp_path / "narrow") > 2 * kept - 400


def test_a_narrow_model_is_not_turned_into_another_narrow_type(tmp_path: Path) -> None:
    model = MLP(4, (4,), 2).bfloat16()
    model.layers[0].weight.data[0, 0] = 1e30
    for dtype in (torch.float16, torch.float32):
        save(model, tmp_path, dtype=dtype)
        assert_same_state(load(tmp_path), model)


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = MLP(4, (4,), 2)
    model.layers[0].weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*beyond the range of torch\.float16"):
        save(model, tmp_path, dtype=torch.float16)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"dtype is torch\.int8: store values as one of float16"):
        save(model, tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("hidden", [(128, 128), (512, 512)])
def test_at_a_tenth_of_the_weights_it_is_a_fifth_of_the_bytes(tmp_path: Path, hidden: tuple[int, int]) -> None:
    model = MLP(64, hidden, 10)
    save(model, tmp_path, magnitude(model, 0.1), provenance={"metrics": {"test/accuracy": 0.9722, "val/loss": 0.1}})
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert size(tmp_path) <= 0.2 * dense


def test_saving_moves_no_generator_and_neither_does_loading(tmp_path: Path) -> None:
    model = bert()
    before = torch.get_rng_state()
    save(model, tmp_path)
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    model = MLP(4, (4,), 2)
    for name in ("a", "b"):
        save(model, tmp_path / name)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    assert all(
        (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes() for name in names(tmp_path / "a")
    )


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_with_and_without_its_pooler(tmp_path: Path, pooler: bool) -> None:
    """Its configuration does not say."""
    from transformers import BertModel

    config = bert().config
    model = BertModel(config, add_pooling_layer=pooler).eval()
    save(model, tmp_path)
    back: Any = load(tmp_path)
    assert (back.pooler is not None) == pooler
    ids = torch.randint(0, 40, (3, 7))
    with torch.no_grad():
        assert torch.equal(back(ids).last_hidden_state, model(ids).last_hidden_state)
