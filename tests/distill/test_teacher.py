import copy
import gc
import importlib
import json
import math
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distill.cache import CachedTeacher, cache_teacher
from distill.teacher import Teacher, averaged
from tests.helpers.tiny_gpt2 import gpt2
from workbench import load
from workbench.checkpoints import compact
from workbench.checkpoints.int8 import Int8Linear, quantize
from workbench.models import MLP
from workbench.records.source import Source
from workbench.tasks import OutputType


class Moody(nn.Module):
    """Batch statistics and dropout, and a note of the mode it was asked in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(any(module.training for module in self.modules()))
        return self.layers(x)


@pytest.fixture
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            num_labels=3,
        )
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_is_in_eval_mode_at_every_call_whatever_was_done_to_it() -> None:
    """Pitfall 1: batch statistics move even under no_grad."""
    network = Moody().train()
    teacher = Teacher(network)
    before = copy.deepcopy(teacher.module.state_dict())
    x = torch.randn(32, 6)
    first = teacher(x)
    teacher.module.train()
    assert torch.equal(teacher(x), first)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert not any(teacher.module.modes)  # type: ignore[arg-type]


def test_the_holder_does_not_own_it() -> None:
    """Pitfall 2."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(6, 3)
            self.teacher = Teacher(Moody())

    holder = Holder()
    assert holder.state_dict().keys() == {"student.weight", "student.bias"}
    assert len(list(holder.parameters())) == 2
    assert len(list(holder.modules())) == 2
    assert holder.train().to(torch.float64).teacher.module.layers[0].weight.dtype == torch.float32  # type: ignore[index, union-attr]
    assert not any(module.training for module in holder.teacher.module.modules())


def test_a_network_is_copied_and_left_alone() -> None:
    network = Moody().train()
    teacher = Teacher(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    with torch.no_grad():
        network.layers[0].weight.zero_()
    assert teacher.module.layers[0].weight.any()  # type: ignore[index, union-attr]


def test_its_output_takes_part_in_autograd_as_a_constant() -> None:
    """Not an inference tensor, which backward may not save."""
    weight = torch.randn(3, requires_grad=True)
    output = Teacher(Moody())(torch.randn(4, 6, requires_grad=True))
    assert not output.requires_grad
    assert not output.is_inference()
    (output * weight).sum().backward()
    assert torch.allclose(weight.grad, output.sum(0))  # type: ignore[arg-type]


def test_copies_share_it() -> None:
    teacher = Teacher(Moody())
    held = copy.deepcopy({"teacher": teacher})
    assert held["teacher"] is teacher


def test_follows_the_inputs_to_their_device() -> None:
    """The meta device stands in for an accelerator."""
    teacher = Teacher(MLP(6, [5], 3))
    assert teacher(torch.zeros(2, 6)).device.type == "cpu"
    assert teacher(torch.zeros(2, 6, device="meta")).device.type == "meta"
    assert {parameter.device.type for parameter in teacher.module.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reads_inputs_of_another_precision(dtype: torch.dtype) -> None:
    """As under the Trainer's "bf16-true", where only the student is converted."""
    teacher = Teacher(MLP(6, [5], 3))
    assert teacher(torch.zeros(2, 6, dtype=dtype)).dtype == torch.float32


def test_takes_keywords_and_nested_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, *, views: list[Tensor], scale: float) -> Tensor:
            return self.layer(views[0] + views[1]) * scale

    teacher = Teacher(Nested())
    views = [torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)]
    assert teacher(views=views, scale=2.0).dtype == torch.float32
    assert teacher(views=[view.to("meta") for view in views], scale=2.0).device.type == "meta"


@pytest.mark.parametrize("kind", [str, Path, Source])
@pytest.mark.parametrize("stage", [False, True])
def test_loads_a_compact_checkpoint_or_the_stage_around_it(tmp_path: Path, kind: Any, stage: bool) -> None:
    network = MLP(6, [5], 3)
    compact.save(network, tmp_path / "compact")
    teacher = Teacher(kind(tmp_path if stage else tmp_path / "compact"))
    assert same(teacher.module, network)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_loads_a_transformers_folder(tmp_path: Path, bert: Any) -> None:
    bert.save_pretrained(tmp_path / "bert")
    teacher = Teacher(str(tmp_path / "bert"))
    assert same(teacher.module, bert)
    ids = torch.randint(0, 20, (2, 5))
    assert torch.equal(teacher(input_ids=ids).logits, bert.eval()(input_ids=ids).logits)


def test_what_is_loaded_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compact.save(MLP(6, [5], 3), tmp_path / "compact")
    made: list[weakref.ref[nn.Module]] = []

    def watch(path: Path) -> nn.Module:
        module = load(path)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(compact, "load", watch)
    teacher = Teacher(tmp_path)
    gc.collect()
    assert [module() for module in made] == [teacher.module]


def test_a_transformers_folder_without_a_trained_head_is_refused(tmp_path: Path, bert: Any) -> None:
    """transformers fills the head with random numbers and goes on."""
    bert.bert.config.architectures = ["BertForSequenceClassification"]
    bert.bert.save_pretrained(tmp_path / "headless")
    claims(tmp_path / "headless", "BertForSequenceClassification")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"lacks 2 weights of a .*'classifier\.bias'.*head was trained"):
            Teacher(tmp_path / "headless")


def claims(folder: Path, *architectures: str) -> None:
    """Let the folder's configuration name these classes."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": list(architectures)}))


TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def kinds() -> dict[str, Any]:
    """Models of several kinds, with inputs, by the class that their folder has to be loaded as."""
    import transformers as hf

    words = {"input_ids": torch.arange(10).reshape(2, 5)}
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    gpt2 = hf.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    vision = hf.ViTConfig(**{**TINY, "image_size": 8, "patch_size": 4, "num_labels": 3})
    return {
        "BertForMaskedLM": (hf.BertForMaskedLM(hf.BertConfig(**TINY)), words),
        "BertModel": (hf.BertModel(hf.BertConfig(**TINY)), words),
        "GPT2LMHeadModel": (hf.GPT2LMHeadModel(gpt2), words),
        "ViTForImageClassification": (hf.ViTForImageClassification(vision), pixels),
    }


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "GPT2LMHeadModel", "ViTForImageClassification"])
def test_a_transformers_folder_is_loaded_as_what_it_says(tmp_path: Path, kind: str) -> None:
    model, inputs = kinds()[kind]
    model.save_pretrained(tmp_path / "model")
    teacher = Teacher(tmp_path / "model")
    assert type(teacher.module).__name__ == kind
    with torch.no_grad():
        expected = model.eval()(**inputs)
    assert torch.equal(teacher(**inputs)[0], expected[0])


def test_a_plain_encoder_may_lack_its_pooler_and_then_has_none(tmp_path: Path) -> None:
    model, inputs = kinds()["BertForMaskedLM"]
    model.bert.save_pretrained(tmp_path / "encoder")
    teacher = Teacher(tmp_path / "encoder")
    assert type(teacher.module).__name__ == "BertModel"
    output = teacher(**inputs)
    assert output.pooler_output is None
    assert torch.equal(output.last_hidden_state, model.eval().bert(**inputs).last_hidden_state)


def test_a_class_that_transformers_lacks_is_loaded_as_a_classifier(tmp_path: Path, bert: Any) -> None:
    bert.save_pretrained(tmp_path / "bert")
    claims(tmp_path / "bert", "SomebodysOwnBert", "Path")
    assert type(Teacher(tmp_path / "bert").module).__name__ == "BertForSequenceClassification"


def test_a_truncated_transformers_folder_says_so(tmp_path: Path, bert: Any) -> None:
    bert.save_pretrained(tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="nor a model that transformers loads: ") as caught:
        Teacher(tmp_path / "bert")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere", "owner/nowhere", "nowhere", ""])
def test_a_wrong_path_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"teacher '{name}' ") as caught:
        Teacher(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(ValueError, match="holds none: give a finished stage, a compact checkpoint or a transformers"):
        Teacher(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither a stage, nor a compact checkpoint, nor a model"):
        Teacher(tmp_path)


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    compact.save(MLP(6, [5], 3), tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes"):
        Teacher(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_narrower_precision_answers_in_float32_and_nearly_the_same(precision: Any) -> None:
    network, x = MLP(16, [64, 64], 5, activation="gelu"), torch.randn(40, 16)
    exact, narrow = Teacher(network)(x), Teacher(network, precision=precision)(x)
    assert narrow.dtype == torch.float32
    error = float((narrow - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.03
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [[], ["layers.0"]], ids=["output", "features"])
def test_autocast_of_who_asks_changes_nothing(half: torch.dtype, features: list[str]) -> None:
    """A live teacher says in a Trainer of mixed precision what it says to a cache outside of one."""
    network, x = MLP(6, [5], 3), torch.randn(4, 6)
    precisions: list[Any] = [None, "bf16", "int8"]
    for precision in precisions:
        teacher = Teacher(network, precision)
        alone = teacher.outputs((x,), {}, features)
        with torch.autocast("cpu", half):
            inside = teacher.outputs((x,), {}, features)
            asked = teacher.outputs((x.to(half),), {})[0]
            assert torch.is_autocast_enabled("cpu")
        assert inside[0].dtype == asked.dtype == torch.float32
        assert torch.equal(inside[0], alone[0])
        assert inside[1].keys() == alone[1].keys()
        assert all(torch.equal(inside[1][name], value) for name, value in alone[1].items())


def test_a_function_is_left_to_autocast() -> None:
    network, x = nn.Linear(6, 3), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert Teacher(network.forward)(x).dtype == torch.bfloat16
        assert Teacher(network)(x).dtype == torch.float32


def test_networks_without_weights_or_inputs_are_asked_too() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(3)

    with torch.autocast("cpu", torch.bfloat16):
        assert Teacher(nn.ReLU())(torch.ones(2, device="meta")).device.type == "meta"
        assert torch.equal(Teacher(Constant())(), torch.ones(3))


def test_what_is_no_teacher_is_named(tmp_path: Path) -> None:
    network = nn.Linear(6, 3)
    cache_teacher(network, DataLoader(TensorDataset(torch.randn(4, 6)), 2), tmp_path)
    both: Any = [network, CachedTeacher(tmp_path)]
    with pytest.raises(
        ValueError, match=r"a teacher is a CachedTeacher: give networks, .* cache_teacher\(\[one, other\]"
    ):
        Teacher(both)


def test_bf16_reads_bf16_and_holds_half_the_bytes() -> None:
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            seen.append((x.dtype, ids.dtype))
            return {"logits": self.layer(x), "ids": ids}

    output = Teacher(Watching(), precision="bf16")(torch.randn(2, 6), torch.arange(2))
    assert seen == [(torch.bfloat16, torch.int64)]
    assert {name: value.dtype for name, value in output.items()} == {"logits": torch.float32, "ids": torch.int64}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (33, 7), (2, 3, 7), (0, 7)])
def test_int8_linear_is_the_sum_that_its_docstring_says(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(7, 5, bias=bias)
    x, w = torch.randn(shape), linear.weight.detach().double()
    rows = x.reshape(-1, 7).double()
    expected = torch.zeros(len(rows), 5, dtype=torch.float64)
    for i, row in enumerate(rows):
        scale = row.abs().max() / 127
        for j in range(5):
            step = w[j].abs().max() / 127
            expected[i, j] = (
                scale * step * sum(round(float(a / scale)) * round(float(b / step)) for a, b in zip(row, w[j]))
            )
    expected = expected + (linear.bias.detach().double() if bias else 0)
    found = Int8Linear(linear.weight, linear.bias)(x)
    assert found.shape == (*shape[:-1], 5)
    assert torch.allclose(found.double().reshape(-1, 5), expected, atol=1e-6)


def test_int8_rows_do_not_depend_on_each_other_and_zeros_are_no_trouble() -> None:
    layer, x = Int8Linear(torch.zeros(3, 5).index_fill(0, torch.tensor([1]), 2.0)), torch.randn(9, 5)
    x[4] = 0
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    assert together.isfinite().all()
    assert not together[4].any()
    assert not together[:, [0, 2]].any()


def test_int8_takes_gpt2_and_shared_layers_and_leaves_attention_its_weight() -> None:
    model, inputs = kinds()["GPT2LMHeadModel"]
    narrow, exact = Teacher(model, precision="int8"), Teacher(model)
    assert sum(isinstance(module, Int8Linear) for module in narrow.module.modules()) == 5
    assert (narrow(**inputs).logits - exact(**inputs).logits).abs().max() < 0.02 * exact(**inputs).logits.abs().max()
    shared = nn.Linear(4, 4)
    twice = quantize(nn.Sequential(shared, nn.ReLU(), shared))
    assert twice[0] is twice[2]  # type: ignore[index]
    assert isinstance(quantize(nn.Linear(2, 3)), Int8Linear)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    assert (Teacher(layer, precision="int8")(x) - Teacher(layer)(x)).abs().max() < 0.1


def test_compiles_at_the_first_call_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], torch.compile

    def watch(module: nn.Module) -> Any:
        made.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", watch)
    network = MLP(6, [5], 3)
    teacher, x = Teacher(network, compile=True), torch.randn(2, 6)
    assert made == []
    assert torch.equal(teacher(x), network(x))
    assert torch.equal(teacher(x=x), network(x))
    assert made == [teacher.module]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_several_are_averaged_by_their_weights(average: Any) -> None:
    networks, x = [MLP(6, [5], 3), MLP(6, [7], 3), MLP(6, [4], 3)], torch.randn(4, 6)
    found = Teacher(networks, weights=[7, 3, 0], average=average)(x)
    for row, answers in zip(found, zip(*(network(x).tolist() for network in networks))):
        if average == "logits":
            expected = [0.7 * a + 0.3 * b for a, b, _ in zip(*answers)]
        else:
            p = [[math.exp(z) / sum(map(math.exp, each)) for z in each] for each in answers]
            expected = [math.log(0.7 * a + 0.3 * b) for a, b, _ in zip(*p)]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_several_of_one_output_are_averaged() -> None:
    networks, x = [nn.Linear(6, 1), nn.Linear(6, 1)], torch.randn(4, 6)
    torch.testing.assert_close(Teacher(networks, weights=[3, 1])(x), 0.75 * networks[0](x) + 0.25 * networks[1](x))
    assert averaged([torch.tensor(2.0), torch.tensor(4.0)], [0.5, 0.5]) == 3
    with pytest.raises(ValueError, match="over one class is always 1"):
        averaged([torch.zeros(4, 1)] * 2, [0.5, 0.5], "probabilities")


def test_equal_weights_by_default_and_impossible_classes_stay_impossible() -> None:
    one, other = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[2.0, 1.0, -math.inf]])
    assert Teacher([lambda: one, lambda: other])().tolist() == [[1.0, 1.0, -math.inf]]
    p = averaged([one, other], [0.5, 0.5], "probabilities").exp()
    assert p.sum() == pytest.approx(1)
    assert p[0, 2] == 0
    assert averaged([one, torch.full((1, 3), math.inf)], [1.0, 0.0]).tolist() == one.tolist()


def test_no_keys_and_values_are_kept_for_a_next_token() -> None:
    model = gpt2()
    assert model.config.use_cache
    before = Teacher(model).fingerprint()
    raw = Teacher(model)(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert not [name for name in raw if "cache" in name or "past" in name]
    assert model.config.use_cache
    model.config.use_cache = False
    assert Teacher(model).fingerprint() == before


def test_half_precision_answers_are_averaged_in_float32() -> None:
    logits = [torch.full((1, 2), value, dtype=torch.bfloat16) for value in (1.0, 1.0078125)]
    mean = averaged(logits, [0.5, 0.5])
    assert mean.dtype == torch.float32
    assert mean.tolist() == [[1.00390625] * 2]


def test_several_may_be_of_any_kind(tmp_path: Path) -> None:
    compact.save(MLP(6, [5], 3), tmp_path)
    x = torch.randn(2, 6)
    teacher = Teacher([tmp_path, lambda x: {"logits": 2 * x[:, :3]}])
    assert torch.allclose(teacher(x), (load(tmp_path)(x) + 2 * x[:, :3]) / 2)
    with pytest.raises(ValueError, match="is a function: it has no module"):
        _ = teacher.module
    assert isinstance(Teacher([MLP(6, [5], 3), tmp_path]).module, nn.ModuleList)


def test_a_function_is_asked_without_a_graph_and_as_it_is() -> None:
    weight, seen = torch.ones(3, requires_grad=True), []

    def function(x: Tensor, *, scale: float) -> Tensor:
        seen.append(x)
        return x * weight * scale

    x = torch.ones(2, 3, dtype=torch.float64)
    output = Teacher(function)(x, scale=2.0)
    assert seen[0] is x
    assert not output.requires_grad
    assert output.tolist() == [[2.0] * 3] * 2


def test_features_come_with_the_output() -> None:
    network, x = MLP(6, [5], 3), torch.randn(4, 6)
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    for precision in (None, "bf16"):
        teacher = Teacher(network, precision=precision)  # type: ignore[arg-type]
        output, features = teacher.outputs((x,), {}, [name])
        assert torch.equal(output, teacher(x))
        assert list(features) == [name]
        assert features[name].dtype == torch.float32
        assert torch.allclose(features[name], network.get_submodule(name)(x), atol=0.1)
        assert not any(module._forward_hooks for module in teacher.module.modules())
    assert Teacher(network).outputs((x,), {})[1] == {}
    with pytest.raises(ValueError, match="requested of several teachers"):
        Teacher([network, network]).outputs((x,), {}, [name])
    with pytest.raises(ValueError, match="requested of a function"):
        Teacher(network.forward).outputs((x,), {}, [name])


def test_the_fingerprint_is_of_the_weights_and_not_of_the_place(tmp_path: Path, bert: Any) -> None:
    bert.save_pretrained(tmp_path / "one")
    bert.save_pretrained(tmp_path / "other")
    first = Teacher(tmp_path / "one").fingerprint()
    assert Teacher(str(tmp_path / "other")).fingerprint() == first
    others = [Teacher(tmp_path / "one", precision="bf16"), Teacher([bert, bert]), Teacher([bert, bert], weights=[2, 1])]
    others += [Teacher([bert, bert], average="probabilities"), Teacher(bert.forward), Teacher(bert.bert.forward)]
    others += [Teacher(lambda x: x), Teacher(lambda x: x + x)]
    assert len({first, *(each.fingerprint() for each in others)}) == 1 + len(others)
    with torch.no_grad():
        bert.classifier.bias[0] += 1e-7
    assert Teacher(bert).fingerprint() != first


def test_the_fingerprint_is_of_the_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a network whose forward was edited, or of a function with another constant, is another one."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("x + 1", "x + 1  # more", "x + 2"):
        (tmp_path / "teacher_of_mine.py").write_text(
            f"from torch import nn\ndef f(x):\n    return {text}\n"
            "class Net(nn.Linear):\n    def forward(self, x):\n        return f(x)\n"
        )
        sys.modules.pop("teacher_of_mine", None)
        importlib.invalidate_caches()
        module = importlib.import_module("teacher_of_mine")
        torch.manual_seed(0)
        found.append((Teacher(module.f).fingerprint(), Teacher(module.Net(2, 2)).fingerprint()))
    sys.modules.pop("teacher_of_mine")
    first, commented, edited = found
    assert commented == first
    assert edited[0] != first[0]
    assert edited[1] != first[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp4"}, "precision is 'fp4': choose bf16, int8, or None"),
        ({"average": "votes"}, "average is 'votes': choose from logits, probabilities"),
        ({"weights": [1.0]}, r"weights is \[1.0\] for one teacher"),
        ({"source": []}, "the list of teachers is empty"),
        ({"source": [nn.ReLU(), nn.ReLU()], "weights": [1.0]}, r"weights is \[1.0\] for 2 teachers"),
        ({"source": [nn.ReLU(), nn.ReLU()], "weights": [1.0, -1.0]}, "finite numbers of at least 0"),
        ({"source": [nn.ReLU(), nn.ReLU()], "weights": [0.0, 0.0]}, "one of them above"),
        ({"source": [nn.ReLU(), nn.ReLU()], "weights": [1.0, math.nan]}, "finite numbers"),
        ({"source": print, "precision": "bf16"}, "precision 'bf16' is set for a function"),
        ({"source": print, "compile": True}, "compile is set for a function"),
        ({"precision": "int8"}, "ReLU has no nn.Linear to quantise: give 'bf16' or None"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**{"source": nn.ReLU(), **arguments})


def test_teachers_of_unlike_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give logits \[2, 3\] and \[2, 4\]: give ones over the same classes"):
        Teacher([MLP(6, [5], 3), MLP(6, [5], 4)])(torch.randn(2, 6))
    with pytest.raises(ValueError, match="returned NoneType without logits"):
        Teacher([lambda: None, lambda: None])()


class Named(nn.Module):
    """Returns its logits under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.layer(x)}


def test_logits_of_a_form_of_its_own() -> None:
    one, other, x = Named(), Named(), torch.randn(4, 3)
    teacher = Teacher(one, logits="scores")
    assert torch.equal(teacher.select(teacher(x)), one(x)["scores"])
    both = Teacher([one, other], logits="scores")
    torch.testing.assert_close(both.select(both(x)), (one(x)["scores"] + other(x)["scores"]) / 2)
    with pytest.raises(ValueError, match="the teacher returned dict without logits"):
        Teacher(one).select(one(x))
    assert len({made.fingerprint() for made in (teacher, Teacher(one), Teacher(one, logits=0))}) == 3


def test_probabilities_are_averaged_of_classes_along_the_last_axis_only() -> None:
    several = Teacher([Named(), Named()], average="probabilities", logits="scores")
    several.check_outputs(OutputType("classes"))
    for outputs in (OutputType("labels"), OutputType("classes", 1)):
        with pytest.raises(ValueError, match="average probabilities of classes along the last axis"):
            several.check_outputs(outputs)
        Teacher([Named(), Named()]).check_outputs(outputs)
    with pytest.raises(ValueError, match="a softmax over one class is always 1"):
        Teacher([nn.Linear(3, 1), nn.Linear(3, 1)], average="probabilities")(torch.randn(4, 3))


def test_a_network_is_a_teacher_after_a_call_that_left_a_weight_with_a_history() -> None:
    network = nn.utils.spectral_norm(nn.Linear(4, 3)).eval()
    inputs = torch.randn(2, 4)
    expected = network(inputs)
    assert torch.equal(Teacher(network)(inputs), expected)
