"""What a wrong argument says, wherever in the arguments it is."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench.launcher.arguments import Arguments
from workbench.launcher.jobs import find_jobs
from workbench.launcher.recipe import Recipe, RecipeError, Stage

OWN = """
from lightning.pytorch import LightningModule
from torch import nn

class Net(LightningModule):
    def __init__(self, width: int, loss: nn.Module | None = None, rate: float = 0.1) -> None:
        super().__init__()
"""
FOREIGN = """
import lightning.pytorch as pl
class Callback:
    pass
Callback.__module__ = "pytorch_lightning.callbacks.callback"
class Mine(Callback):
    pass
"""
DATA: dict[str, Any] = {"class_path": "workbench.data.Digits"}
CALLBACKS = "lightning.pytorch.callbacks"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_net.py").write_text(OWN)
    (tmp_path / "foreign_net.py").write_text(FOREIGN)
    (tmp_path / "broken_net.py").write_text("1 / 0")
    (tmp_path / "needy_net.py").write_text("import not_installed_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_net", "foreign_net", "broken_net", "needy_net"):
        sys.modules.pop(name, None)


def net(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "own_net.Net", "init_args": {"width": 3, **arguments}}


def optimizer(name: str, **arguments: Any) -> dict[str, Any]:
    return {"optimizer": {"class_path": f"torch.optim.{name}", "init_args": arguments}}


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": arguments}], "max_steps": 1}}


FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("missing argument", {"data": None}, "data", "is required by job 'fit' and not given"),
    (
        "unknown in a class",
        {"model": net(widht=3)},
        "model.init_args.widht",
        "Net has no such argument; did you mean 'width'?",
    ),
    ("wrong type in a class", {"model": net(width="wide")}, "model.init_args.width", "is 'wide': expected int"),
    (
        "missing in a class",
        {"model": {"class_path": "own_net.Net"}},
        "model.init_args.width",
        "is required by Net and not given",
    ),
    (
        "unknown in a nested class",
        {"model": net(loss={"class_path": "torch.nn.Linear", "init_args": {"in_feature": 1}})},
        "model.init_args.loss.init_args.in_feature",
        "Linear has no such argument; did you mean 'in_features'?",
    ),
    (
        "no such nested class",
        {"model": net(loss={"class_path": "torch.nn.CrossEntropy"})},
        "model.init_args.loss.class_path",
        "module 'torch.nn' has no 'CrossEntropy'; did you mean 'CrossEntropyLoss'?",
    ),
    (
        "no such class",
        {"model": {"class_path": "own_net.Nte"}},
        "model.class_path",
        "module 'own_net' has no 'Nte'; did you mean 'Net'?",
    ),
    (
        "no such module",
        {"model": {"class_path": "own_nte.Net"}},
        "model.class_path",
        "there is no module 'own_nte'; did you mean 'own_net'?",
    ),
    (
        "no such submodule",
        {"model": {"class_path": "workbench.models.actvations.Gelu"}},
        "model.class_path",
        "there is no module 'workbench.models.actvations'; did you mean 'activations'?",
    ),
    (
        "broken module",
        {"model": {"class_path": "broken_net.Net"}},
        "model.class_path",
        "importing broken_net fails: ZeroDivisionError: division by zero",
    ),
    (
        "module that lacks another",
        {"model": {"class_path": "needy_net.Net"}},
        "model.class_path",
        "importing needy_net fails: No module named 'not_installed_at_all'",
    ),
    (
        "bare name",
        {"model": {"class_path": "Nte"}},
        "model",
        "no class 'Nte' is known: give its full path, package.module.Nte",
    ),
    ("another kind of class", {"model": DATA}, "model.class_path", "Digits is not a Module"),
    (
        "key beside class_path",
        {"model": {"class_path": "own_net.Net", "width": 3}},
        "model",
        "'width' is beside class_path: arguments of the class go into init_args",
    ),
    (
        "init_args no mapping",
        {"model": {"class_path": "own_net.Net", "init_args": [3]}},
        "model",
        "a class is given as {class_path: package.module.Class, init_args: {argument: value}}",
    ),
    (
        "no class_path",
        {"model": {"width": 3}},
        "model",
        "has no class_path: expected {class_path: package.module.Class, init_args: {argument: value}}",
    ),
    (
        "no class at all",
        {"model": 3},
        "model",
        "is 3: expected a Module, as {class_path: package.module.Class, init_args: {...}}",
    ),
    (
        "trainer key",
        {"trainer": {"max_epoch": 3}},
        "trainer.max_epoch",
        "Lightning's Trainer has no such argument; did you mean 'max_epochs'?",
    ),
    ("trainer type", {"trainer": {"max_epochs": "many"}}, "trainer.max_epochs", "is 'many': expected int or null"),
    (
        "trainer choice",
        {"trainer": {"precision": "17-mixed", "max_steps": 1}},
        "trainer.precision",
        "did you mean '16-mixed'?",
    ),
    (
        "trainer no mapping",
        {"trainer": [3]},
        "trainer",
        "is [3]: arguments of Lightning's Trainer are expected, e.g. {max_epochs: 10}",
    ),
    (
        "no budget",
        {"trainer": {"accelerator": "cpu"}},
        "trainer",
        "has neither max_epochs nor max_steps: say how long to train, e.g. {max_epochs: 10}",
    ),
    (
        "callback argument",
        callback(f"{CALLBACKS}.EarlyStopping", monitr="x"),
        "trainer.callbacks[0].init_args.monitr",
        "EarlyStopping has no such argument; did you mean 'monitor'?",
    ),
    (
        "callback argument missing",
        callback(f"{CALLBACKS}.EarlyStopping"),
        "trainer.callbacks[0].init_args.monitor",
        "is required by EarlyStopping and not given",
    ),
    (
        "callback class",
        callback(f"{CALLBACKS}.EarlyStoping"),
        "trainer.callbacks[0].class_path",
        "module 'lightning.pytorch.callbacks' has no 'EarlyStoping'; did you mean 'EarlyStopping'?",
    ),
    (
        "no callback",
        {"trainer": {"callbacks": DATA, "max_steps": 1}},
        "trainer.callbacks.class_path",
        "Digits is not a Callback",
    ),
    (
        "foreign callback",
        callback("foreign_net.Mine"),
        "trainer.callbacks[0].class_path",
        "Mine belongs to pytorch_lightning, recipes run on lightning.pytorch: take it from there, "
        "or change the import of its base class",
    ),
    (
        "logger argument",
        {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_di": "x"}}}},
        "trainer.logger.init_args.save_di",
        "CSVLogger has no such argument; did you mean 'save_dir'?",
    ),
    (
        "optimizer argument",
        optimizer("SGD", lrr=1),
        "optimizer.init_args.lrr",
        "SGD has no such argument; did you mean 'lr'?",
    ),
    ("optimizer type", optimizer("SGD", lr="fast"), "optimizer.init_args.lr", "is 'fast': expected float or Tensor"),
    (
        "optimizer class",
        optimizer("SGDD"),
        "optimizer.class_path",
        "module 'torch.optim' has no 'SGDD'; did you mean 'SGD'?",
    ),
    (
        "optimizer no class",
        {"optimizer": {"lr": 1}},
        "optimizer",
        "has no class_path: expected {class_path: package.module.Class, init_args: {argument: value}}",
    ),
    (
        "scheduler argument missing",
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR"}},
        "lr_scheduler.init_args.step_size",
        "is required by StepLR and not given",
    ),
    (
        "duration",
        {"checkpoint": "3 epochs"},
        "checkpoint",
        "duration '3 epochs': write epochs as '3ep' or optimizer steps as '500it'",
    ),
    (
        "a callback's settings",
        {
            "trainer": {
                "max_epochs": 1,
                "callbacks": [
                    {
                        "class_path": "prune.GradualPruning",
                        "init_args": {"density": 1.5, "begin": "0it", "end": "2it", "every": "1it"},
                    }
                ],
            }
        },
        "trainer.callbacks[0]",
        "density is 1.5: give the share of weights to keep, above 0 and at most 1",
    ),
    ("seed", {"seed_everything": "x"}, "seed_everything", "is 'x': expected int"),
    ("seed out of range", {"seed_everything": -1}, "seed_everything", "is -1: a seed is between 0 and 4294967295"),
    ("null", {"seed_everything": None}, "seed_everything", "is null: expected int"),
]
OTHERS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "hunt",
        {"pruner": {"criterion": "magnitud"}},
        "pruner",
        "unknown criterion 'magnitud'; did you mean 'magnitude'?",
    ),
    (
        "hunt",
        {"pruner": {"include": 3}},
        "pruner.include",
        "is 3: expected str or type[Module] or Sequence[str | type[Module]] or null",
    ),
    (
        "export",
        {"of": "x", "formats": ["onx"]},
        "formats",
        "is [onx]: expected list['compact' or 'torch' or 'onnx'] or null; did you mean 'onnx'?",
    ),
    (
        "export",
        {"of": "x", "level": "lst"},
        "level",
        "is 'lst': expected int or 'last' or 'winning' or null; did you mean 'last'?",
    ),
    (
        "distill",
        {"losses": {"soft": {"weigth": 0.9}}},
        "losses.soft.weigth",
        "Term has no such argument; did you mean 'weight'?",
    ),
    (
        "distill",
        {"losses": {"soft": {"loss": {"class_path": "distill.losses.SoftTarget", "init_args": {"temprature": 2}}}}},
        "losses.soft.loss.init_args.temprature",
        "SoftTarget has no such argument; did you mean 'temperature'?",
    ),
    (
        "distill",
        {"model": {"small": {"class_path": "workbench.models.MLP", "init_args": {"hiden": [4]}}}},
        "model.small.init_args.hiden",
        "MLP has no such argument; did you mean 'hidden'?",
    ),
    (
        "distill",
        {"model": {"class_path": "workbench.models.LeNet300", "init_args": {"widht": 3}}},
        "model.init_args.widht",
        "LeNet300 has no such argument; allowed: activation, classes, norm, init",
    ),
    (
        "distill",
        {"losses": {"soft": {"loss": {"class_path": "distill.losses.SoftTarget", "init_args": {"temperature": -4}}}}},
        "losses.soft",
        "temperature is -4.0: a positive number is needed, usually 1 to 10",
    ),
    (
        "distill",
        {"losses": {"hint": {"loss": "distill.losses.Hint"}}},
        "losses.hint",
        "Hint compares features: name them, student: layers.1",
    ),
    (
        "distill",
        {"losses": {"hard": {"weight": -1}}},
        "losses.hard",
        "weight is -1.0: give a finite number of at least 0",
    ),
    ("distill", {"precision": "fp8"}, "precision", "is 'fp8': expected 'bf16' or 'int8' or null"),
    ("export", {"of": "x", "values": None}, "values", "is null: expected 'float32' or 'float16' or 'bfloat16'"),
]


def message(job: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        Arguments(Recipe(Path("r.yaml"), ()), Stage("s", find_jobs()[job], arguments))
    return str(caught.value)


@pytest.mark.parametrize(("wrong", "key", "said"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_fault_in_a_fit_is_named_where_it_is(wrong: dict[str, Any], key: str, said: str) -> None:
    found = message("fit", {"model": net(), "data": DATA, "trainer": {"max_steps": 1}, **wrong})
    assert found.startswith(f"r.yaml, stage 's', key '{key}': ")
    assert found.endswith(said)
    assert "\n" not in found


@pytest.mark.parametrize(("job", "wrong", "key", "said"), OTHERS, ids=[f"{row[0]}.{row[2]}" for row in OTHERS])
def test_a_fault_in_another_job(job: str, wrong: dict[str, Any], key: str, said: str) -> None:
    given = {"model": net(), "teacher": "x", "data": DATA, "trainer": {"max_steps": 1}} if job == "distill" else {}
    assert message(job, {**given, **wrong}) == f"r.yaml, stage 's', key '{key}': {said}"


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"levels": {"coutn": 8}}, "levels.coutn", "Steps has no such argument; did you mean 'count'?"),
    ({"levels": {"count": "many"}}, "levels.count", "is 'many': expected int or null"),
    ({"levels": {"total": 1}}, "levels.total", "Steps has no such argument"),
    ({"levels": "many"}, "levels", "is 'many': expected int or Steps {count, rate, names} or null"),
    ({"levels": {"rate": 2}}, "levels", "rate is 2.0: give a share in (0, 1)"),
    ({"levels": {"rate": None}}, "levels.rate", "is null: expected float"),
    ({"rewind": {"mode": "all"}}, "rewind.at", "is required by Rewind and not given"),
    ({"rewind": {"at": "2ep", "mode": "al"}}, "rewind.mode", "is 'al': expected 'all' or 'weights'; did you"),
    ({"rewind": {"at": "2xp"}}, "rewind.at", "duration '2xp': write epochs as '3ep' or optimizer steps as '500it'"),
    ({"rewind": {"at": "2ep", "inner": {"rat": 1}}}, "rewind.inner.rat", "Steps has no such argument; did you mean"),
    ({"exact": {"rat": 1}}, "exact.rat", "Steps has no such argument; did you mean 'rate'?"),
    ({"exact": {"rate": 3}}, "exact", "rate is 3.0: give a share in (0, 1)"),
    ({"exact": 3}, "exact", "is 3: expected Steps {count, rate, names}"),
    ({"terms": {"a": {"rate": "x"}}}, "terms.a.rate", "is 'x': expected float"),
    ({"modes": ["al"]}, "modes", "list['all' or 'weights'] or Rewind {at, mode, inner} or null; did you mean 'all'"),
]  # fmt: skip


@pytest.mark.usefixtures("pruning")
@pytest.mark.parametrize(("given", "key", "message"), FIELDS)
def test_a_wrong_field_is_named_by_its_dotted_key(given: dict[str, Any], key: str, message: str) -> None:
    job = find_jobs()["prune_in_steps"]
    with pytest.raises(RecipeError) as caught:
        Arguments(Recipe(Path("r.yaml"), ()), Stage("one", job, given))
    assert str(caught.value).startswith(f"r.yaml, stage 'one', key '{key}': ")
    assert message in str(caught.value)
