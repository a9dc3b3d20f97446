"""A ticket found elsewhere: what of it is taken, what stays as the new network has it, and that it is trained so."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor

from distill import DistillModule
from prune.masks import Masks
from prune.tickets.transfer import transfer
from tests.helpers.trainers import Stop, StopAfter
from tests.prune.tickets.test_arms import Watch
from workbench import load, records
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import run
from workbench.models import MLP, LeNet5
from workbench.records.source import Source

RECIPE = """
data: {class_path: workbench.data.Digits, init_args: {batch_size: 256}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
trainer: {max_epochs: 2, accelerator: cpu}
seed_everything: 3
model: {class_path: workbench.models.MLP, init_args: {hidden: [12], activation: relu, norm: batch}}
teacher: {job: fit, trainer: {max_epochs: 1}}
student: {job: distill, teacher: teacher, alpha: 1.0}
plain: {job: hunt, levels: {count: 2, rate: 0.5}, rewind: 0it}
late: {job: hunt, levels: {count: 1, rate: 0.5, tolerance: 1.0}, rewind: 3it}
taught:
  job: hunt
  model: null
  data: null
  optimizer: null
  start: student
  levels: {count: 1, rate: 0.5}
  rewind: 0it
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hunts in a plain network and in a student, to read from."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hunts.yaml").write_text(RECIPE)
    run(recipes.read(folder / "hunts.yaml"), folder)
    return folder


class Start(lp.Callback):
    """The module and its network's weights at the first batch of each training."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: lp.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            self.modules.append(module)
            self.weights.append({name: value.clone() for name, value in module.network.state_dict().items()})

    def __deepcopy__(self, memo: Any) -> "Start":
        return self


def mlp(activation: str = "gelu", classes: int = 10, **options: Any) -> MLP:
    torch.manual_seed(5)
    return MLP(64, [12], classes, activation, "batch", **options)


def equal(one: Path, other: Path) -> bool:
    a, b = compact.tensors(one), compact.tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "level"), [("plain", 1), ("plain", 2), ("taught", 1)])
def test_moved_to_where_it_comes_from_a_ticket_is_trained_as_it_was(
    runs: Path, tmp_path: Path, name: str, level: int
) -> None:
    """From the initial weights, with the same data, seed, optimizer, and teacher."""
    start = Start()
    result = transfer(Source(runs / name), level, trainer={"callbacks": [start]}, out=tmp_path)
    hunted = records.read(runs / name / f"level_{level:02d}") or {}
    assert equal(tmp_path, runs / name / f"level_{level:02d}")
    for key in ("metrics", "history", "density", "layers", "mask_hash"):
        assert result[key] == hunted[key]
    assert result["left"] == []
    assert result["of"] == {"level": level, "mask_hash": hunted["mask_hash"], "weights": "rewound"}
    assert isinstance(start.modules[0], DistillModule) == (name == "taught")
    assert (tmp_path / "example.safetensors").is_file()


def test_another_activation_gets_weights_and_mask(runs: Path, tmp_path: Path) -> None:
    start, network = Start(), mlp("gelu")
    result = transfer(Source(runs / "late"), "last", model=network, trainer={"callbacks": [start]}, out=tmp_path)
    masks = compact.masks(runs / "late" / "level_01")
    checkpoint = torch.load(runs / "late" / "checkpoints" / "rewind.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3
    for name, value in start.weights[0].items():
        expected = checkpoint["state_dict"][f"network.{name}"]
        assert torch.equal(value, expected * masks[name] if name in masks else expected), name
    assert result["left"] == []
    assert Masks(compact.masks(tmp_path)) == Masks(masks)
    shipped = load(tmp_path)
    assert isinstance(shipped, MLP)
    assert shipped.init_args["activation"] == "gelu"
    optimizer = start.modules[0].optimizers().optimizer
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.SGD, 0.1), "the hunt's"


def test_an_output_of_other_classes_is_left_as_it_is(runs: Path, tmp_path: Path) -> None:
    start, network = Start(), mlp("relu", 12)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    data = Digits(batch_size=256)
    data.classes = 12
    options: dict[str, Any] = {"model": network, "data": data, "controls": ["shuffled", "random", "reinit"]}
    result = transfer(Source(runs / "plain"), 2, trainer={"callbacks": [start]}, out=tmp_path, **options)
    assert result["left"] == ["layers.3.weight", "layers.3.bias"]
    assert list(result["layers"]) == ["layers.0.weight"]
    assert torch.equal(start.weights[0]["layers.3.weight"], own["layers.3.weight"])
    assert not torch.equal(start.weights[0]["layers.0.bias"], own["layers.0.bias"]) or not own["layers.0.bias"].any()
    mask = compact.masks(runs / "plain" / "level_02")["layers.0.weight"]
    assert torch.equal(start.weights[0]["layers.0.weight"] != 0, mask)
    assert {name: record["density"] for name, record in result["controls"].items()} == dict.fromkeys(
        options["controls"], result["density"]
    )
    assert torch.equal(start.weights[1]["layers.3.weight"], own["layers.3.weight"]), "shuffled starts as it does"
    assert not torch.equal(start.weights[3]["layers.3.weight"], own["layers.3.weight"]), "reinit does not"


def test_only_the_mask(runs: Path, tmp_path: Path) -> None:
    start, network = Start(), mlp()
    own = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = {"callbacks": [start], "max_epochs": 1}
    result = transfer(Source(runs / "late"), 1, "own", model=network, trainer=trainer, out=tmp_path)
    masks = compact.masks(runs / "late" / "level_01")
    for name, value in start.weights[0].items():
        assert torch.equal(value, own[name] * masks[name] if name in masks else own[name])
    assert len(result["history"]) == 1, "its own trainer's"
    assert result["of"]["weights"] == "own"


def test_the_winning_level_by_default_and_the_last_where_none_is(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    record = records.read(tmp_path / "plain") or {}
    records.write(tmp_path / "plain", {**record, "winning": 1})
    quick: dict[str, Any] = {"trainer": {"max_epochs": 1, "limit_train_batches": 1}}
    assert transfer(Source(tmp_path / "plain"), out=tmp_path / "a", **quick)["of"]["level"] == 1
    for none in (0, None):
        records.write(tmp_path / "plain", {**record, "winning": none})
        assert transfer(Source(tmp_path / "plain"), out=tmp_path / str(none), **quick)["of"]["level"] == 2


def test_a_teacher_stays_unless_something_else_is_trained(runs: Path, tmp_path: Path) -> None:
    start = Start()
    trainer = {"callbacks": [start], "max_epochs": 1, "limit_train_batches": 1}
    transfer(Source(runs / "taught"), 1, data=Digits(batch_size=128), trainer=trainer, out=tmp_path / "data")
    transfer(Source(runs / "taught"), 1, model=mlp(), trainer=trainer, out=tmp_path / "model")
    transfer(Source(runs / "taught"), 1, trainer=trainer, out=tmp_path / "kept")
    assert [isinstance(module, DistillModule) for module in start.modules] == [False, False, True]
    point = torch.load(runs / "taught" / "checkpoints" / "rewind.ckpt", weights_only=False)["state_dict"]
    for weights in start.weights:
        assert torch.equal(weights["layers.1.weight"], point["network.layers.1.weight"])


def test_a_stopped_transfer_ends_as_an_undisturbed_one(runs: Path, tmp_path: Path) -> None:
    StopAfter.left = 0

    options: dict[str, Any] = {"controls": ["random"], "trainer": {"callbacks": [StopAfter()]}}
    whole = transfer(Source(runs / "plain"), 1, model=mlp(), out=tmp_path / "whole", **options)
    for left in (7, 9, 0):
        StopAfter.left = left
        try:
            pieces = transfer(Source(runs / "plain"), 1, model=mlp(), out=tmp_path / "pieces", **options)
        except Stop:
            continue
    assert equal(tmp_path / "whole", tmp_path / "pieces")
    assert equal(tmp_path / "whole" / "level_01" / "random", tmp_path / "pieces" / "level_01" / "random")
    assert pieces["metrics"] == whole["metrics"]
    assert not list((tmp_path / "pieces").rglob("*.ckpt"))


def test_batches_are_those_of_the_hunt(runs: Path, tmp_path: Path) -> None:
    watch = Watch()
    for name, options in {"a": {}, "b": {"model": mlp()}}.items():
        transfer(Source(runs / "plain"), 1, trainer={"callbacks": [watch]}, out=tmp_path / name, **options)
    assert watch.seen[str(tmp_path / "a" / "level_01")] == watch.seen[str(tmp_path / "b" / "level_01")]


def test_what_cannot_be_moved_is_named(runs: Path, tmp_path: Path) -> None:
    plain = Source(runs / "plain")
    with pytest.raises(ValueError, match="teacher is no finished hunt: name a stage of job hunt"):
        transfer(Source(runs / "teacher"), out=tmp_path)
    with pytest.raises(ValueError, match="nowhere is no finished hunt"):
        transfer(Source(tmp_path / "nowhere"), out=tmp_path)
    with pytest.raises(ValueError, match=r"level is 5, but .* has levels 0 to 2"):
        transfer(plain, 5, out=tmp_path)
    with pytest.raises(ValueError, match=r"level 0 of .* is dense: name one from 1 to 2"):
        transfer(plain, 0, out=tmp_path)
    with pytest.raises(ValueError, match=r"nothing that LeNet5 has .*: 'layers.0.weight' is \(12, 64\) there, missing"):
        transfer(plain, 1, model=LeNet5(image_size=8), out=tmp_path)
    with pytest.raises(ValueError, match=r"'layers.0.weight' is \(12, 64\) there, \(13, 64\) here; give a model with"):
        transfer(plain, 1, model=MLP(64, [13], 10, norm="batch"), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_altered_or_missing_weights_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    hunt, file = Source(tmp_path / "plain"), tmp_path / "plain" / "checkpoints" / "rewind.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="altered: hunt again, or take only the mask, with weights: own"):
        transfer(hunt, 1, out=tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match="rewind point, is missing: hunt again"):
        transfer(hunt, 1, out=tmp_path / "out")
    trainer = {"max_epochs": 1, "limit_train_batches": 1}
    transfer(hunt, 1, "own", trainer=trainer, out=tmp_path / "out")


def test_it_is_a_stage_of_a_recipe(runs: Path, tmp_path: Path) -> None:
    text = f"""
moved:
  job: transfer
  start: {runs / "plain"}
  level: 1
  model: {{class_path: workbench.models.MLP, init_args: {{hidden: [12], activation: silu, norm: batch}}}}
  controls: [reinit]
  trainer: {{max_epochs: 1}}
"""
    (tmp_path / "r.yaml").write_text(text)
    (record,) = run(recipes.read(tmp_path / "r.yaml"), tmp_path / "out")
    assert (record["status"], record["of"]["level"], record["seed"]) == ("finished", 1, 3)
    assert record["controls"]["reinit"]["density"] == record["density"]
    shipped = load(tmp_path / "out" / "moved")
    assert isinstance(shipped, MLP)
    assert shipped.init_args["activation"] == "silu"
    (kept,) = run(recipes.read(tmp_path / "r.yaml"), tmp_path / "out")
    assert (kept["ended"], kept["metrics"]) == (record["ended"], record["metrics"]), "kept"
