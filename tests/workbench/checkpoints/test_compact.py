import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench import load, save, swap_activation
from workbench.checkpoints import compact
from workbench.models import MLP, Conv, DenseNet, LeNet5, Recurrent, RecurrentTokens, Transformer


def magnitude(model: nn.Module, density: float = 0.1) -> dict[str, Tensor]:
    """Masks of the largest weights of every matrix, applied."""
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            order = parameter.detach().float().abs().flatten().argsort(descending=True, stable=True)
            mask[order[: round(density * len(mask))]] = True
            masks[name] = mask.view_as(parameter)
            parameter.data.masked_fill_(~masks[name], 0)
    return masks


def same(one: Tensor, other: Tensor) -> bool:
    bits = (one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert same(tensor, second[name]), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=3, **shape, **options)
    )


class Odd(nn.Module):
    """Everything that a state may hold."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.init_args = {"width": width}
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.wide = nn.Linear(width, width, dtype=torch.float64)
        self.half = nn.Linear(width, width, dtype=torch.float16)
        self.brain = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("counts", torch.arange(4, dtype=torch.int16))
        self.register_buffer("large", torch.tensor(2**40))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("odd", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.init_args = {"tied": tied}
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        if tied:
            self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Given(lp.LightningModule):
    """A user's own module, which says what it was built with the Lightning way."""

    def __init__(self, width: int, activation: str = "relu") -> None:
        super().__init__()
        self.save_hyperparameters()
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()
        self.layers = nn.Sequential(nn.Linear(4, width), act, nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Partly(lp.LightningModule):
    def __init__(self, network: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.network = network


class Plain(nn.Module):
    """Takes nothing, so there is nothing to say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Secretive(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (2, 3, 4, 5)])
def test_bits_are_packed_and_unpacked(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = compact.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(mask.numel() / 8),)
    naive = [sum(bit << (7 - i) for i, bit in enumerate(bits)) for bits in _bytes(mask.flatten().int().tolist())]
    assert packed.tolist() == naive
    assert torch.equal(compact.unpack(packed, shape), mask)


def _bytes(bits: list[int]) -> list[list[int]]:
    return [bits[i : i + 8] for i in range(0, len(bits), 8)]


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


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save(MLP(4, (4,), 2), tmp_path / "a")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o644}


def test_importing_it_needs_torch_and_safetensors_only() -> None:
    code = (
        "import sys; from workbench.checkpoints import compact; from workbench import load, save\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'transformers', 'torchmetrics', 'datasets', 'prune', "
        "'distill', 'scipy', 'jsonargparse'} & set(sys.modules)), "
        "sorted(name for name in sys.modules if name.startswith('workbench.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] " + repr(
        [
            *(
                "workbench.checkpoints",
                "workbench.checkpoints.bits",
                "workbench.checkpoints.compact",
                "workbench.files",
            ),
            *("workbench.models", "workbench.models.architecture", "workbench.models.resize"),
        ]
    )


def test_transformers_does_not_take_the_folder_for_a_model_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModel, BertForSequenceClassification

    save(bert(), tmp_path)
    for cls in (AutoModel, BertForSequenceClassification):
        with pytest.raises((OSError, ValueError)):
            cls.from_pretrained(tmp_path)


def test_it_is_found_in_a_stage(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path / "stage" / "compact")
    assert compact.find(tmp_path / "stage") == tmp_path / "stage" / "compact"
    load(tmp_path / "stage")
    with pytest.raises(ValueError, match=r"holds no compact checkpoint: expected checkpoint\.json"):
        load(tmp_path)


# How to build it again


def test_all_defaults_are_a_description_if_the_model_says_so() -> None:
    model = Secretive(4)
    model.init_args = {}  # type: ignore[assignment]
    assert compact.describe(model) is None, "not enough to build it"
    model = Odd()
    model.init_args = {}
    assert compact.describe(model) == {"class_path": f"{__name__}.Odd", "init_args": {}}


def test_the_module_of_a_user_is_described_by_its_hyperparameters() -> None:
    found = compact.describe(Given(6))
    assert found == {"class_path": f"{__name__}.Given", "init_args": {"width": 6, "activation": "relu"}}
    found = compact.describe(swap_activation(Given(6), "gelu"))
    assert found is not None
    assert found["activation"] == "gelu"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Secretive(4),
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: Partly(nn.Linear(2, 2)),
        lambda: lp.LightningModule(),
        nn.Module,
    ],
)
def test_who_does_not_say_is_not_guessed(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    if type(model) not in (lp.LightningModule,):
        assert compact.describe(model) is None
    save(model, tmp_path, architecture=None)
    if compact.read_index(tmp_path)["architecture"] is None:
        with pytest.raises(
            ValueError, match=r"does not say how to build its model: pass one, load\(path, model=\.\.\.\)"
        ):
            load(tmp_path)
    filled = make()
    assert load(tmp_path, model=filled) is filled
    assert_same_state(filled, model)
    assert not filled.training


def test_a_class_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    class Local(Plain):
        pass

    model = Local()
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"needs the class .*Local.*cannot be imported.*load\(path, model=\.\.\.\)"):
        load(tmp_path)
    assert_same_state(load(tmp_path, model=Local()), model)


def test_the_weights_of_another_model_are_refused_and_nothing_is_filled(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path)
    other = MLP(4, (5,), 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"holds the weights of another model.*layers\.0\.weight' is \[5, 4\], \[4, 4\] here"
    ):
        load(tmp_path, model=other)
    assert all(same(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="holds the weights of another model"):
        load(tmp_path, model=MLP(4, (4,), 2, norm="batch"))
    with torch.device("meta"):
        hollow = MLP(4, (4,), 2)
    with pytest.raises(ValueError, match="did not load"), pytest.warns(UserWarning, match="meta"):
        load(tmp_path, model=hollow)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Extra(2, 2), r"_extra_state.*is a dict"),
        (lambda: MLP(4, (4,), 2).to("meta"), "that have values"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    ],
)
def test_a_state_that_is_not_plain_tensors_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save(make(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"nowhere": torch.ones(1, dtype=torch.bool)}, "names no parameter"),
        ({"layers.1.running_mean": torch.ones(24, dtype=torch.bool)}, "names no parameter"),
        ({"layers.0.weight": torch.ones(24, 16)}, r"is torch\.float32"),
        ({"layers.0.weight": torch.ones(16, 24, dtype=torch.bool)}, r"bool \[24, 16\] is needed"),
        ({"layers.0.weight": torch.zeros(24, 16, dtype=torch.bool)}, "are not zero: apply the mask"),
    ],
)
def test_a_wrong_mask_is_refused(tmp_path: Path, masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(MLP(16, (24,), 5, norm="batch"), tmp_path / "a", masks)
    assert not (tmp_path / "a").exists()


def test_a_pruned_nan_is_not_zero(tmp_path: Path) -> None:
    model = MLP(4, (4,), 2)
    model.layers[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not zero"):
        save(model, tmp_path, {"layers.0.weight": torch.zeros(4, 4, dtype=torch.bool)})


@pytest.mark.parametrize(
    "extra",
    [
        {"provenance": {"a": object()}},
        {"architecture": {"class_path": 3}},
        {"architecture": {"class_path": "a.B"}},
        {"architecture": {"class_path": "a.B", "init_args": []}},
        {"architecture": {"class_path": "a.B", "init_args": {}, "config": {}}},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"JSON|architecture"):
        save(MLP(4, (4,), 2), tmp_path / "a", **extra)
    assert not (tmp_path / "a").exists()


# Replacing


def test_replacing_leaves_one_checkpoint(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = MLP(4, (4,), 2)
        save(model, tmp_path)
        save(model, tmp_path)
        assert len(names(tmp_path)) == 2
        assert_same_state(load(tmp_path), model)


CALLS: dict[str, tuple[Any, str]] = {
    "os.replace": (os, "replace"),
    "os.fsync": (os, "fsync"),
    "write_bytes": (Path, "write_bytes"),
    "write_text": (Path, "write_text"),
    "touch": (Path, "touch"),
    "_verify": (compact, "_verify"),
    "write_json": (compact, "write_json"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "key"]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_anywhere_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "a"
    old = MLP(4, (4,), 2)
    if existing:
        save(old, path)
    before = {name: (path / name).read_bytes() for name in names(path)} if existing else {}
    owner, name = CALLS[call]
    original = getattr(owner, name)
    for fatal in range(5):
        count = 0

        def fail(*args: Any, fatal: int = fatal, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal + 1:
                raise error
            return original(*args, **kwargs)

        new = MLP(4, (4,), 2)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            raised = None
            try:
                save(new, path)
            except type(error) as caught:
                raised = caught
        if raised is None:
            break
        if isinstance(error, OSError):
            assert "No space left on device" in str(raised)
        left = {found.name: found.read_bytes() for found in path.iterdir()} if path.exists() else {}
        if call == "os.fsync" and fatal > 1:
            continue  # the index is renamed before its folder is flushed
        assert left == before, "nothing is changed and nothing is left behind"
        if existing:
            assert_same_state(load(path), old)
    assert fatal > 0, "the call was reached"
    save(new, path)
    assert_same_state(load(path), new)
    assert len(names(path)) == 2


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights-of-mine.safetensors").write_text("mine")
    for name in (
        "weights-0123456789abcdef.safetensors",
        ".weights-0123456789abcdef.safetensors.77-12.tmp",
        ".checkpoint.json.77-12.tmp",
    ):
        (tmp_path / name).write_text("half")
    model = MLP(4, (4,), 2)
    save(model, tmp_path)
    index = compact.read_index(tmp_path)
    assert set(names(tmp_path)) == {
        "checkpoint.json",
        index["weights"]["file"],
        "notes.txt",
        "weights-of-mine.safetensors",
    }
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_damaged_checkpoint_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    model = MLP(4, (4,), 2)
    save(model, tmp_path)
    assert_same_state(load(tmp_path), model)


def test_a_disk_that_loses_bits_is_noticed_before_the_old_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = MLP(4, (4,), 2)
    save(old, tmp_path)
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(self, data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(ValueError, match="altered"):
        save(MLP(4, (4,), 2), tmp_path)
    monkeypatch.undo()
    assert_same_state(load(tmp_path), old)
    assert len(names(tmp_path)) == 2


# Hostile and damaged folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("saved")
    model = MLP(6, (8,), 3, norm="batch")
    return save(model, path, magnitude(model, 0.3), provenance={"metrics": {"loss": 0.5}})


def copied(saved: Path, to: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(saved, to, dirs_exist_ok=True)
    return to, json.loads((to / "checkpoint.json").read_text())


def signed(path: Path, index: Any, sign: bool = True) -> None:
    """Write the index, with the checksum that a forger would give it."""
    if sign and isinstance(index, dict):
        index.pop("sha256", None)
        index["sha256"] = hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(index))


def refused(path: Path) -> str:
    """The message with which every way to read the folder refuses it."""
    messages = []
    for read in (load, compact.tensors, compact.masks):
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            read(path)
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(path, model=MLP(6, (8,), 3, norm="batch"))
    return messages[0]


@pytest.mark.parametrize("which", ["json", "weights"])
@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, which: str, place: float, value: int
) -> None:
    path, index = copied(saved, tmp_path_factory.mktemp("flip"))
    file = path / ("checkpoint.json" if which == "json" else index["weights"]["file"])
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= value
    file.write_bytes(content)
    try:
        state = compact.tensors(path)
    except ValueError as error:
        said = str(error)
    else:
        said = str(file)
        assert which == "json"
        assert json.loads(content) == index, "white space, or another spelling of the same"
        assert all(same(tensor, state[name]) for name, tensor in compact.tensors(saved).items())
    assert str(file) in said


@pytest.mark.parametrize("which", ["json", "weights"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path, which: str, share: float) -> None:
    path, index = copied(saved, tmp_path)
    file = path / ("checkpoint.json" if which == "json" else index["weights"]["file"])
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert str(file) in refused(path)
    file.write_bytes(content + b" x")
    assert str(file) in refused(path)
    file.unlink()
    with pytest.raises(ValueError, match=str(path)):
        load(path)


W = "layers.0.weight"
HUGE = 10**9


def edit(keys: list[Any], value: Any) -> Callable[[Any], Any]:
    """Set, or where ``value`` is Ellipsis delete, what lies under the keys."""

    def change(index: Any) -> Any:
        if not keys:
            return value
        inner = index
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        return index

    return change


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "huge shape": edit(["tensors", W, "shape"], [HUGE, HUGE]),
    "huge shape, nothing kept": edit(["tensors", W], {"dtype": "float32", "shape": [HUGE, 100], "kept": 0}),
    "huge dense shape": edit(["tensors", "layers.0.bias", "shape"], [HUGE]),
    "overflowing shape": edit(["tensors", W, "shape"], [2**62, 2**62, 2**62]),
    "overflowing empty shape": edit(["tensors", W], {"dtype": "float32", "shape": [0, 2**62, 2**62], "kept": 0}),
    "enormous number": edit(["tensors", W, "shape"], [10**400, 0]),
    "negative shape": edit(["tensors", W, "shape"], [-6, -8]),
    "other shape of as many": edit(["tensors", W, "shape"], [6, 8]),
    "flat shape": edit(["tensors", W, "shape"], [48]),
    "fractional shape": edit(["tensors", W, "shape"], [6.0, 8.0]),
    "shape of bools": edit(["tensors", W, "shape"], [True, 48]),
    "shape of strings": edit(["tensors", W, "shape"], ["8", "6"]),
    "shape is a number": edit(["tensors", W, "shape"], 48),
    "shape is none": edit(["tensors", W, "shape"], None),
    "no shape": edit(["tensors", W, "shape"], ...),
    "a million dimensions": edit(["tensors", W, "shape"], [1] * 10**5),
    "other dtype": edit(["tensors", W, "dtype"], "float64"),
    "narrower dtype": edit(["tensors", W, "dtype"], "bfloat16"),
    "unknown dtype": edit(["tensors", W, "dtype"], "quint8"),
    "dtype is a function": edit(["tensors", W, "dtype"], "load"),
    "dtype is a list": edit(["tensors", W, "dtype"], ["float32"]),
    "stored otherwise": edit(["tensors", W, "stored"], "float16"),
    "stored is none": edit(["tensors", W, "stored"], None),
    "too few kept": edit(["tensors", W, "kept"], 13),
    "too many kept": edit(["tensors", W, "kept"], 15),
    "more kept than there are": edit(["tensors", W, "kept"], 49),
    "negative kept": edit(["tensors", W, "kept"], -1),
    "kept is true": edit(["tensors", W, "kept"], True),
    "kept is none": edit(["tensors", W, "kept"], None),
    "kept is a string": edit(["tensors", W, "kept"], "14"),
    "mask forgotten": edit(["tensors", W, "kept"], ...),
    "mask on what has none": edit(["tensors", "layers.0.bias", "kept"], 8),
    "entry is none": edit(["tensors", W], None),
    "entry is a list": edit(["tensors", W], []),
    "alias of itself": edit(["tensors", W], {"alias": W}),
    "alias of an alias": edit(["tensors", "x"], {"alias": "y"}),
    "alias of nothing": edit(["tensors", W], {"alias": "nowhere"}),
    "alias of a number": edit(["tensors", W], {"alias": 3}),
    "alias of a list": edit(["tensors", W], {"alias": []}),
    "alias and more": edit(["tensors", W, "alias"], "layers.0.bias"),
    "alias of another shape": edit(["tensors", W], {"alias": "layers.0.bias"}),
    "entry missing": edit(["tensors", W], ...),
    "entry of nothing": edit(["tensors", "more"], {"dtype": "float32", "shape": [2]}),
    "no entries": edit(["tensors"], {}),
    "entries are a list": edit(["tensors"], []),
    "newer version": edit(["version"], 2),
    "version is true": edit(["version"], True),
    "version is a float": edit(["version"], 1.0),
    "version is missing": edit(["version"], ...),
    "foreign format": edit(["format"], "safetensors"),
    "a list": edit([], [1, 2]),
    "a number": edit([], 1),
    "nothing": edit([], None),
    "file above": edit(["weights", "file"], "../weights-0123456789abcdef.safetensors"),
    "absolute file": edit(["weights", "file"], "/etc/passwd"),
    "parent folder": edit(["weights", "file"], ".."),
    "own index": edit(["weights", "file"], "checkpoint.json"),
    "file with a zero": edit(["weights", "file"], "weights-0123456789abcdef.safetensors\0"),
    "file with a newline": edit(["weights", "file"], "weights-0123456789abcdef.safetensors\n"),
    "file is a number": edit(["weights", "file"], 3),
    "other file": edit(["weights", "file"], "weights-0123456789abcdef.safetensors"),
    "no weights": edit(["weights"], ...),
    "weights are a list": edit(["weights"], []),
    "wrong size": edit(["weights", "bytes"], 3),
    "size is none": edit(["weights", "bytes"], None),
    "no hash": edit(["weights", "sha256"], ...),
    "wrong hash": edit(["weights", "sha256"], "0" * 64),
    "no architecture": edit(["architecture"], ...),
    "architecture is a list": edit(["architecture"], []),
    "architecture is text": edit(["architecture"], "os.system"),
    "class path is a number": edit(["architecture", "class_path"], 3),
    "arguments are a list": edit(["architecture", "init_args"], [6, 8]),
    "arguments are none": edit(["architecture", "init_args"], None),
    "configuration beside arguments": edit(["architecture", "config"], 5),
    "activation is a number": edit(["architecture", "activation"], 3),
    "provenance is a list": edit(["provenance"], []),
}


# A whole checkpoint, if not of this model.
OTHER_MODELS = ("other shape of as many", "flat shape")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_forged_index_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    if case == "alias of an alias":
        index["tensors"]["y"] = {"alias": "x"}
    signed(path, HOSTILE[case](index))
    with limited():
        if case in OTHER_MODELS:
            with pytest.raises(ValueError, match="another model"):
                load(path)
        else:
            refused(path)


@pytest.mark.parametrize("case", ["huge shape", "too few kept", "other dtype", "wrong size"])
def test_a_careless_edit_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    signed(path, HOSTILE[case](index), sign=False)
    assert "was altered" in refused(path)


class limited:
    """No more memory inside than a gigabyte on top of what the process has."""

    def __enter__(self) -> None:
        import resource

        self.before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, self.before[1]))

    def __exit__(self, *_: object) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self.before)


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "function": ({"class_path": "os.system", "init_args": {"command": "exit 1"}}, "not a torch.nn.Module class"),
    "eval": ({"class_path": "builtins.eval", "init_args": {}}, "not a torch.nn.Module class"),
    "class": ({"class_path": "subprocess.Popen", "init_args": {"args": ["false"]}}, "not a torch.nn.Module class"),
    "relative": ({"class_path": ".os.system", "init_args": {}}, "cannot be imported"),
    "empty": ({"class_path": "", "init_args": {}}, "cannot be imported"),
    "dots": ({"class_path": "...", "init_args": {}}, "cannot be imported"),
    "nowhere": ({"class_path": "no.such.Class", "init_args": {}}, "cannot be imported"),
    "no attribute": ({"class_path": "torch.nn.Nothing", "init_args": {}}, "cannot be imported"),
    "unknown argument": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"depth": 3}}, "cannot be built"),
    "wrong argument": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": "wide"}}, "cannot be built"),
    "another model": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}},
        "another model",
    ),
    "huge": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [HUGE]}}, "another model"),
    "more than there is": ({"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [10**15, 10**15]}}, "."),
    "beyond numbers": (
        {"class_path": "workbench.models.mlp.MLP", "init_args": {"hidden": [10**30]}},
        "cannot be built",
    ),
    "unknown activation": (
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}, "activation": "step"},
        "cannot be built",
    ),
    "no configuration": ({"class_path": "torch.nn.Linear", "config": {}}, "cannot be built"),
    "huge configuration": (
        {
            "class_path": "transformers.BertForSequenceClassification",
            "config": {"vocab_size": HUGE, "hidden_size": 768},
        },
        "another model",
    ),
    "wrong configuration": (
        {"class_path": "transformers.BertForSequenceClassification", "config": {"hidden_size": "wide"}},
        "cannot be built",
    ),
    "hidden attention from a hub": (
        {
            "class_path": "transformers.BertForSequenceClassification",
            "config": {"text": [{"_attn_implementation": "evil/kernels"}]},
        },
        "damaged",
    ),
    "attention from a hub": (
        {"class_path": "transformers.BertForSequenceClassification", "config": {"attn_implementation": "evil/kernels"}},
        "damaged",
    ),
    "attention from a hub in a part": (
        {
            "class_path": "workbench.models.SentenceEncoder",
            "init_args": {
                "encoder": {
                    "torch.nn.Module": {
                        "class_path": "transformers.BertModel",
                        "config": {"attn_implementation": "evil/kernels"},
                    }
                }
            },
        },
        "damaged",
    ),
    "a pooler that is no choice": (
        {"class_path": "transformers.BertModel", "config": {}, "pooler": "evil"},
        "damaged",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_forged_class_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    index["architecture"], message = CLASSES[case]
    signed(path, index)
    import transformers  # noqa: F401 - so that its own memory is not counted

    with limited(), pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


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


def test_a_mask_that_is_missing_is_not_read_off_the_zeros(saved: Path, tmp_path: Path) -> None:
    path, index = copied(saved, tmp_path)
    state = load_file(path / index["weights"]["file"])
    del state[f"mask/{W}"]
    rewrite(path, index, state)
    assert f"mask/{W}" in refused(path)


def rewrite(path: Path, index: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Other weights under the same index, with the checksums that a forger would give them."""
    file = path / index["weights"]["file"]
    save_file(state, file)
    index["weights"] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    signed(path, index)


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "another key": lambda state: state.update({"dense/more": torch.ones(2)}),
    "another mask": lambda state: state.update({f"mask/{W}": state[f"mask/{W}"] ^ 1}),
    "longer mask": lambda state: state.update({f"mask/{W}": torch.zeros(700, dtype=torch.uint8)}),
    "mask of floats": lambda state: state.update({f"mask/{W}": torch.zeros(6)}),
    "mask of bools": lambda state: state.update({f"mask/{W}": torch.zeros(6, dtype=torch.bool)}),
    "fewer values": lambda state: state.update({f"values/{W}": state[f"values/{W}"][:-1].clone()}),
    "values of another type": lambda state: state.update({f"values/{W}": state[f"values/{W}"].double()}),
    "dense of another type": lambda state: state.update({"dense/layers.0.bias": torch.zeros(8, dtype=torch.int32)}),
    "dense of another shape": lambda state: state.update({"dense/layers.0.bias": torch.zeros(2, 4)}),
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_forged_weights_are_refused(saved: Path, tmp_path: Path, case: str) -> None:
    path, index = copied(saved, tmp_path)
    state = load_file(path / index["weights"]["file"])
    WEIGHTS[case](state)
    rewrite(path, index, state)
    with limited():
        refused(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}" + b"\0" * 100])
def test_weights_that_are_no_safetensors_are_refused(saved: Path, tmp_path: Path, content: bytes) -> None:
    path, index = copied(saved, tmp_path)
    file = path / index["weights"]["file"]
    file.write_bytes(content)
    index["weights"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    signed(path, index)
    assert str(file) in refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ud800", "NaN", '"' + "\\ud800" + '"'])
def test_an_index_that_is_no_json_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    path, _ = copied(saved, tmp_path)
    (path / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(path)


def test_an_index_nested_to_the_limit_is_refused(saved: Path, tmp_path: Path) -> None:
    path, index = copied(saved, tmp_path)
    for depth in range(900, 1000, 7):
        index["provenance"] = {}
        text = json.dumps(index).replace('"provenance": {}', '"provenance": {"a": ' + "[" * depth + "]" * depth + "}")
        (path / "checkpoint.json").write_text(text)
        refused(path)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    leaves = [None, True, 0, -1, 1, 8, 2**63, 1.5, float("nan"), "", "float32", "alias", W, HUGE]
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    keys = ["dtype", "shape", "kept", "alias", "stored", "file", "class_path", "init_args", "config", W]
    return {rng.choice(keys): random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def test_no_forgery_at_random_gets_through(saved: Path, tmp_path: Path) -> None:
    """Any one value of the index replaced by anything, with the right checksum."""
    path, index = copied(saved, tmp_path)
    state = compact.tensors(saved)
    text = json.dumps(index)
    places = [list(place) for place in paths(index) if place[:1] != ("sha256",)]
    rng = random.Random(0)
    passed = 0
    with limited():
        for _ in range(600):
            forged = edit(rng.choice(places), random_json(rng))(json.loads(text))
            signed(path, forged)
            try:
                found = load(path).state_dict()
            except ValueError as error:
                said = str(error)
            else:
                said = str(path)
                passed += 1
                assert list(found) == list(state)
                assert all(same(tensor, state[name]) for name, tensor in found.items())
            assert str(path) in said
    assert passed < 200, "what is in provenance alone"


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above] if above else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths(item, (*above, key))
    return found
