import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.teacher import Teacher
from workbench import artifact, load
from workbench.models import MLP
from workbench.source import Source


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
    artifact.save(network, tmp_path / "artifact")
    teacher = Teacher(kind(tmp_path if stage else tmp_path / "artifact"))
    assert same(teacher.module, network)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_loads_a_transformers_folder(tmp_path: Path, bert: Any) -> None:
    bert.save_pretrained(tmp_path / "bert")
    teacher = Teacher(str(tmp_path / "bert"))
    assert same(teacher.module, bert)
    ids = torch.randint(0, 20, (2, 5))
    assert torch.equal(teacher(input_ids=ids).logits, bert.eval()(input_ids=ids).logits)


def test_what_is_loaded_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.save(MLP(6, [5], 3), tmp_path / "artifact")
    made: list[weakref.ref[nn.Module]] = []

    def watch(path: Path) -> nn.Module:
        module = load(path)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(artifact, "load", watch)
    teacher = Teacher(tmp_path)
    gc.collect()
    assert [module() for module in made] == [teacher.module]


def test_a_transformers_folder_without_a_trained_head_is_refused(tmp_path: Path, bert: Any) -> None:
    """transformers fills the head with random numbers and goes on."""
    bert.bert.save_pretrained(tmp_path / "headless")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"lacks 2 weights of a .*'classifier\.bias'.*trained for classification"):
            Teacher(tmp_path / "headless")


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
    artifact.save(MLP(6, [5], 3), tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes"):
        Teacher(tmp_path)
