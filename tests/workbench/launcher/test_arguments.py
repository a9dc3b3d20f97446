"""A job's arguments: a LightningCLI config pasted, defaults, fingerprints, building. Faults are in test_faults.py."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from workbench import yaml_io
from workbench.duration import Duration
from workbench.launcher import recipe
from workbench.launcher.arguments import Arguments, essential, rebuild
from workbench.launcher.recipe import Recipe
from workbench.launcher.runner import check, run
from workbench.launcher.terminal import format_resolved
from workbench.models import MLP
from workbench.records.source import Source

OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self, width: int, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, width)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)

class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 4)), self.batch_size)
"""
DISTILLED = """
seed_everything: 3
data: configs/data/digits.yaml
trainer: {max_steps: 2, accelerator: cpu, callbacks: [{class_path: lightning.pytorch.callbacks.Timer}]}
teacher: {job: fit, model: {class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [8], classes: 10}}}
student:
  job: distill
  teacher: teacher
  model: {class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [4], classes: 10}}
  checkpoint: 5it
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
ticket: {job: hunt, start: student, levels: 1, trainer: {accumulate_grad_batches: 1}}
page: {job: report, title: '1e3'}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "somebodys_project"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def planned(path: Path, text: str, *overrides: tuple[str, str]) -> dict[str, Arguments]:
    path.write_text(text)
    return {arguments.stage.name: arguments for arguments in check(recipe.read(path, overrides))}


def only(path: Path, **arguments: Any) -> Arguments:
    """The arguments of a recipe of one fit stage."""
    model = {"class_path": "workbench.models.MLP", "init_args": {"in_features": 64, "hidden": [4], "classes": 10}}
    stage = {"job": "fit", "model": model, "data": {"class_path": "workbench.data.Digits"}, "trainer": {"max_steps": 2}}
    return planned(path, yaml_io.dump({"only": stage | arguments}))["only"]


def written_by_the_cli(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The config that LightningCLI writes, everything that it can hold given."""
    arguments = [
        *("fit", f"--model={module}.Net", "--model.width=3", f"--data={module}.Data"),
        *("--optimizer=SGD", "--optimizer.lr=0.5", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"),
        *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=CSVLogger"),
        *(f"--trainer.logger.save_dir={folder}", "--print_config"),
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        LightningCLI(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("seed", [True, 5])
def test_a_lightningcli_config_pasted_under_a_name_trains(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    config = written_by_the_cli(module, tmp_path, monkeypatch, capsys)
    for line in ("seed_everything: true", "ckpt_path: null", "weights_only: null", "  use_distributed_sampler: true"):
        assert line in config.splitlines()
    config = config.replace("seed_everything: true", f"seed_everything: {yaml_io.inline(seed)}")
    path = tmp_path / "r.yaml"
    path.write_text("mine:\n  job: fit\n" + textwrap.indent(config, "  "))
    (record,) = run(recipe.read(path), tmp_path / "out")
    assert record["status"] == "finished"
    assert record["seed"] == (0 if seed is True else 5)
    assert list(tmp_path.glob("lightning_logs/*/metrics.csv")), "its logger logged"
    made, arguments = rebuild(tmp_path / "out" / "mine")
    assert type(made).__name__ == "Net"
    assert made.hparams == {"width": 3, "rate": 0.1}
    assert type(arguments["data"]).__name__ == "Data"
    configured: Any = made.configure_optimizers()
    (optimizer,), (scheduler,) = configured
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.SGD, 0.5)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)


def test_what_is_printed_is_a_recipe_of_the_same_stages(tmp_path: Path) -> None:
    before = planned(tmp_path / "r.yaml", "# A headline\n" + DISTILLED)
    text = format_resolved(Recipe(tmp_path / "r.yaml", ()), list(before.values()))
    assert text.startswith("# A headline\n")
    after = planned(tmp_path / "printed.yaml", text)
    assert format_resolved(Recipe(tmp_path / "printed.yaml", ()), list(after.values())) == text
    assert list(after) == list(before)
    for name, arguments in before.items():
        assert after[name].fingerprint({"p": "x"}) == arguments.fingerprint({"p": "x"}), name
    student = yaml_io.load(text)["student"]
    assert set(student) == {"job", *(parameter.name for parameter in before["student"].stage.job.parameters)}
    assert student["alpha"] == 0.9
    assert student["model"]["init_args"]["activation"] == "gelu"
    assert student["trainer"]["accumulate_grad_batches"] == 1
    assert student["optimizer"]["init_args"]["momentum"] == 0.0


def test_a_hunt_is_given_only_the_trainer_arguments_that_are_its_own(tmp_path: Path) -> None:
    # The others are those of its start: a default written out would undo what the start was trained with.
    ticket = planned(tmp_path / "r.yaml", DISTILLED)["ticket"]
    given = {"accumulate_grad_batches"}
    assert set(ticket.resolved()["trainer"]) == given
    assert set(ticket.build(lambda source: source)["trainer"]) == given


def test_lightnings_defaults_are_as_if_not_given(tmp_path: Path) -> None:
    short, long = (
        only(tmp_path / "r.yaml", trainer={"max_steps": 2, **more})
        for more in ({}, {"use_distributed_sampler": True, "accumulate_grad_batches": 1, "logger": None})
    )
    assert short.build(lambda source: source)["trainer"] == {"max_steps": 2}
    assert long.build(lambda source: source)["trainer"] == {"max_steps": 2}
    assert long.fingerprint({}) == short.fingerprint({})


def test_no_optimizer_inherits_what_was_meant_for_another(tmp_path: Path) -> None:
    # jsonargparse carries the init_args of a default class over to the class that replaces it: SGD would have AdamW's
    # weight decay. No job has such a default, so what is not given is the class's own.
    for name in ("fit", "distill", "hunt"):
        job = recipe.find_jobs()[name]
        assert all(p.default == "None" for p in job.parameters if p.name in ("optimizer", "lr_scheduler", "task"))
    text = DISTILLED + "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002, weight_decay: 0.3}}\n"
    plan = planned(tmp_path / "r.yaml", text)
    assert plan["teacher"].resolved()["optimizer"]["init_args"]["weight_decay"] == 0.3
    assert plan["student"].resolved()["optimizer"] == {
        "class_path": "torch.optim.SGD",
        "init_args": plan["student"].resolved()["optimizer"]["init_args"] | {"lr": 0.1, "weight_decay": 0.0},
    }


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"checkpoint": "3it"}, True),
        ({"trainer": {"max_steps": 2, "logger": False, "enable_progress_bar": False}}, True),
        ({"trainer": {"max_steps": 3}}, False),
        ({"seed_everything": 1}, False),
        ({"seed_everything": True}, True),
        ({"data": {"class_path": "workbench.data.Digits", "init_args": {"batch_size": 64}}}, True),
        ({"data": {"class_path": "workbench.data.Digits", "init_args": {"batch_size": 65}}}, False),
        ({"optimizer": {"class_path": "torch.optim.SGD"}}, False),
    ],
)
def test_the_fingerprint_is_of_what_can_change_the_result(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    before, after = only(tmp_path / "a.yaml"), only(tmp_path / "b.yaml", **change)
    assert (before.fingerprint({}) == after.fingerprint({})) is same
    assert (essential(before.resolved()) == essential(after.resolved())) is same


def test_only_a_training_job_has_a_checkpoint_that_does_not_matter() -> None:
    trainer = {"logger": {"class_path": "a.B"}, "max_steps": 1}
    given = {"checkpoint": "1ep", "checkpoints": 2}
    assert essential(given) == given
    assert essential(given | {"trainer": trainer}) == {"checkpoints": 2, "trainer.max_steps": 1}


def test_the_fingerprint_holds_the_parents(tmp_path: Path) -> None:
    arguments = only(tmp_path / "r.yaml")
    assert arguments.fingerprint({"of": "a"}) != arguments.fingerprint({"of": "b"})


def test_sources_are_found_and_replaced_when_built(tmp_path: Path) -> None:
    student = planned(tmp_path / "r.yaml", DISTILLED)["student"]
    assert list(student.sources()) == [("teacher", "teacher")]
    made = student.build(lambda source: Source(f"out/{source}"))
    assert made["teacher"] == "out/teacher"
    assert made["checkpoint"] == Duration(5, "it")
    assert isinstance(made["model"], MLP)
    assert made["model"].init_args["hidden"] == [4], "a module remembers what it was made of"
    assert student.seed == 3


def test_building_twice_gives_two_modules(tmp_path: Path) -> None:
    arguments = only(tmp_path / "r.yaml")
    one, other = (arguments.build(lambda source: source)["model"] for _ in range(2))
    assert one is not other


def test_rebuilding_needs_a_finished_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished stage: name a finished fit or distill stage"):
        rebuild(tmp_path)
    (tmp_path / "r.yaml").write_text("only: {job: report}\n")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "record.json").write_text('{"format": 2, "status": "finished", "job": "report", "given": {}}')
    with pytest.raises(ValueError, match="is of job 'report', which trains no module"):
        rebuild(tmp_path / "page")


class Holder(LightningModule):
    """Takes its network and the class of its activation, as a LightningCLI config gives them."""

    def __init__(self, net: torch.nn.Module, act: type[torch.nn.Module] = torch.nn.ReLU, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.act, self.scale = net, act(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.act(self.net(x))


def test_a_module_made_of_a_module_can_be_built_again(tmp_path: Path) -> None:
    from workbench import load, save
    from workbench.launcher.arguments import _build_module
    from workbench.models import MLP

    made = _build_module(Holder, net=_build_module(MLP, hidden=[5]), act=torch.nn.Tanh, scale=2.0).eval()
    save(made, tmp_path)
    back = load(tmp_path)
    x = torch.randn(3, 64)
    assert isinstance(back, Holder)
    assert isinstance(back.act, torch.nn.Tanh)
    assert torch.equal(back(x), made(x))


class Split(LightningDataModule):
    """Draws its split when it is made."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.held_out = torch.randperm(size)[:5].tolist()


def test_data_is_drawn_from_the_seed_whatever_model_was_made_before() -> None:
    from workbench.launcher.arguments import _build_data

    torch.rand(7)
    before = torch.get_rng_state()
    first = _build_data(3, Split).held_out
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert _build_data(3, Split).held_out == first
    assert _build_data(4, Split).held_out != first


def test_each_of_a_family_is_made_as_if_alone(tmp_path: Path) -> None:
    """Its initial weights are the seed's, whoever stands before it."""
    one = "{class_path: workbench.models.MLP, init_args: {hidden: [4]}}"
    other = "{class_path: workbench.models.MLP, init_args: {hidden: [5]}}"
    shared = "teacher: t, data: configs/data/digits.yaml, trainer: {max_steps: 1}, seed_everything: 7"
    (tmp_path / "t").mkdir()

    def built(model: str) -> Any:
        path = tmp_path / "r.yaml"
        path.write_text(f"s: {{job: distill, model: {model}, {shared.replace('t,', f'{tmp_path}/t,', 1)}}}\n")
        (stage,) = check(recipe.read(path))
        torch.manual_seed(7)
        return stage.build(lambda source: source)["model"]

    family = built(f"{{small: {one}, tiny: {other}}}")
    assert list(family) == ["small", "tiny"]
    for name, model in (("small", one), ("tiny", other)):
        for key, value in built(model).state_dict().items():
            assert torch.equal(family[name].state_dict()[key], value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("family", "stage 'family' trains a family: name one of family/small, family/tiny"),
        ("family/smal", "stage 'family' has no 'smal'; did you mean 'family/small'?"),
        ("teacher/small", "stage 'teacher' has no 'small': it trains one network, name it 'teacher'"),
    ],
)
def test_a_student_that_no_stage_trains_is_refused_before_any_training(
    tmp_path: Path, source: str, message: str
) -> None:
    mlp = "{class_path: workbench.models.MLP, init_args: {hidden: [4]}}"
    (tmp_path / "r.yaml").write_text(f"""
data: configs/data/digits.yaml
trainer: {{max_steps: 1}}
teacher: {{job: fit, model: {mlp}}}
family: {{job: distill, teacher: teacher, model: {{small: {mlp}, tiny: {mlp}}}}}
bought: {{job: compare, teacher: teacher, students: [family/tiny, {source}]}}
""")
    with pytest.raises(recipe.RecipeError) as caught:
        check(recipe.read(tmp_path / "r.yaml"))
    assert str(caught.value).endswith(message)


@pytest.mark.usefixtures("pruning")
@pytest.mark.parametrize(
    ("text", "overrides", "built"),
    [
        ("levels: 8", [], "8, 1ep"),
        ("levels: 8, rewind: 2ep", [("levels", "{count: 3}")], "Steps(count=3, rate=0.2, names=[], total=0), 2ep"),
        ("rewind: {at: 2ep}", [("levels.rate", "0.3")], "Steps(count=None, rate=0.3, names=[], total=0), 2ep/all"),
        ("levels: {count: 8}", [("levels.count", "3")], "Steps(count=3, rate=0.2, names=[], total=0), 1ep"),
        ("levels: {count: 1}", [("rewind.at", "5it"), ("rewind.mode", "weights")], "Steps(count=1"),
    ],
)
def test_a_dataclass_may_be_given_bare_or_by_field_and_is_printed_so(
    tmp_path: Path, text: str, overrides: list[tuple[str, str]], built: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"one: {{job: prune_in_steps, {text}}}\n")
    first = recipe.read(path, [(f"one.{key}", value) for key, value in overrides])
    (plan,) = check(first)
    made = plan.build(lambda source: source)
    rewind = getattr(made["rewind"], "at", made["rewind"])
    mode = f"/{made['rewind'].mode}" if hasattr(made["rewind"], "mode") else ""
    assert f"{made['levels']!r}, {rewind}{mode}".startswith(built)
    printed = format_resolved(first, [plan])
    path.write_text(printed)
    (again,) = check(recipe.read(path))
    assert again.build(lambda source: source) == made, "a Rewind is not written as if it were the Duration beside it"
    assert (again.resolved(), again.fingerprint({})) == (plan.resolved(), plan.fingerprint({}))


@pytest.mark.usefixtures("pruning")
def test_a_field_cannot_be_set_inside_a_bare_value(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("one: {job: prune_in_steps, levels: 8}\n")
    with pytest.raises(recipe.RecipeError, match=r"one\.levels is 8, which has no keys: give a mapping, \{count: "):
        recipe.read(tmp_path / "r.yaml", [("one.levels.count", "3")])
