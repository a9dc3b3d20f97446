"""What people ask of a verdict, of masks that stop moving, and of a recipe whose network they edit."""

import importlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune import EarlyBird, Pruner, find_tickets
from prune.tickets.judge import LevelScores, judged
from prune.tickets.level import Level
from prune.tickets.sections.hunt import hunt_of
from prune.tickets.sections.verdict import sentence
from tests.setups.base import Setup
from workbench import load
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.evaluation.compare import compare
from workbench.launcher import recipe
from workbench.launcher.recipe import RecipeError
from workbench.launcher.runner import run
from workbench.models import MLP
from workbench.records import Verdict, read_run
from workbench.records.source import Source
from workbench.report.summary import gather
from workbench.training.fit import fit, module_for
from workbench.training.loop import evaluate

NAN = [float("nan")] * 5


def _hunt(draw: np.random.Generator, levels: int, advantage: float = 0.0, seeds: int = 5) -> list[LevelScores]:
    """Accuracies of a hunt whose tickets are ``advantage`` above dense and re-initialised networks."""
    dense = draw.normal(0.97, 0.003, seeds).tolist()
    return [
        LevelScores(
            (draw.normal(0.97, 0.003, seeds) + advantage).tolist(),
            {"level 0": dense},
            {"reinit": draw.normal(0.97, 0.003, seeds).tolist()},
            level,
        )
        for level in range(1, levels + 1)
    ]


def a_small_advantage() -> None:
    """Before, 75 % of such hunts read "no ticket: it is no better than reinit"."""
    draw, verdicts = np.random.default_rng(0), []
    for _ in range(40):
        verdicts += judged([_hunt(draw, 1, 0.003)], delta=0.02)[0]
    assert {each.verdict for each in verdicts} == {"ticket", "inconclusive"}
    assert {each.why for each in verdicts} == {
        "it matches level 0 and beats reinit",
        "it is not shown to beat reinit",
    }


def dense_diverged() -> None:
    """Before, "ticket: it matches  and beats reinit"."""
    ticket, reinit = [0.97, 0.971, 0.969, 0.97, 0.972], [0.94, 0.938, 0.941, 0.939, 0.94]
    ((level,),) = judged([[LevelScores(ticket, {"level 0": NAN}, {"reinit": reinit})]], delta=0.01)
    assert level.verdict == "inconclusive"
    assert level.why == "level 0 diverged in every seed: there is no dense network to match"


def controls_diverged() -> None:
    """Before, "no control was trained: give the hunt controls"."""
    ticket = [0.97, 0.971, 0.969, 0.97, 0.972]
    ((level,),) = judged([[LevelScores(ticket, {"level 0": ticket[::-1]}, {"reinit": NAN, "random": NAN})]], 0.01)
    assert level.verdict == "inconclusive"
    assert level.why == "reinit and random diverged in every seed: no control is left to beat"


def twelve_levels() -> None:
    """Before, 46 % of hunts without any ticket showed one; 5 % may, and more than 5 of 30 do once in 300 times."""
    draw = np.random.default_rng(0)
    shown = sum(any(lv.verdict == "ticket" for lv in judged([_hunt(draw, 12)], 0.02)[0]) for _ in range(30))
    assert shown <= 5


def groups() -> None:
    """Four sweeps of one level each: before, 19 % showed a ticket where there is none."""
    draw, shown, runs = np.random.default_rng(0), 0, 60
    for _ in range(runs):
        verdicts = judged([_hunt(draw, 1) for _ in range(4)], 0.02)
        shown += any(level.verdict == "ticket" for levels in verdicts for level in levels)
        assert {level.alpha for levels in verdicts for level in levels} <= {0.05 / n for n in (1, 2, 3, 4)}
    assert shown <= 7


def unrelated_masks() -> None:
    """Magnitudes drawn anew after every epoch, at 3 % density: before, a ticket as soon as the window was full."""

    class Redrawn(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for weight in pl_module.parameters():
                nn.init.normal_(weight)

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(50, 40)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    for relative in (True, False):
        torch.manual_seed(0)
        bird = EarlyBird(Pruner(), 0.03, window=3, distance="relative" if relative else "hamming")
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=[Redrawn(), bird], **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Net(), DataLoader(TensorDataset(torch.rand(4, 50)), batch_size=2))
        assert (bird.drawn_at is None) == relative
        if relative:
            assert all(0.8 < each < 1.1 for each in bird.distances), bird.distances


NET = """
import torch
from torch import nn
from layers_of_mine import block

class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = block(64, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(torch.sigmoid(self.layers(x)))
"""
LAYERS = """
from torch import nn

def block(inside, outside):
    return nn.Sequential(nn.Linear(inside, outside), nn.ReLU())
"""
RECIPE = """
data: {class_path: workbench.data.Digits}
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 1, limit_test_batches: 1}
net: {job: fit, model: {class_path: net_of_mine.Net}}
"""


@contextmanager
def _project() -> Iterator[Path]:
    """A folder on the path with a network, a module beside it and a recipe."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in (("net_of_mine.py", NET), ("layers_of_mine.py", LAYERS), ("r.yaml", RECIPE)):
            (folder / file).write_text(text)
        sys.path.insert(0, name)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            sys.path.remove(name)
            _forget()


def _forget() -> None:
    """As a new process has it."""
    for name in ("net_of_mine", "layers_of_mine"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    _forget()


def forward_edited() -> None:
    """sigmoid to tanh, then the same command: before, the stage was kept as it was."""

    def command(replace: bool = False) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(recipe.read(folder / "r.yaml"), folder / "out", replace)[0]

    with _project() as folder:
        first = command()
        _edit(folder / "net_of_mine.py", "def forward(self, x):", "def forward(self, x):  # the answer")
        assert command()["ended"] == first["ended"], "a comment changes nothing"
        assert command()["seconds"] == first["seconds"]
        _edit(folder / "net_of_mine.py", "sigmoid", "tanh")
        said = r"made with other code \(net_of_mine\.py has changed: Net\.forward\): choose another --out, or --replace"
        with pytest.raises(RecipeError, match=said):
            command()
        assert command(replace=True)["fingerprint"] != first["fingerprint"]


def helper_edited() -> None:
    """A function that the network calls, in another file: before, the levels of a hunt were kept."""

    def hunt() -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = importlib.import_module("net_of_mine").Net()
        return find_tickets(model, _train, levels=1, rewind="0it", out=folder / "hunt")

    with _project() as folder:
        hunt()
        assert len(hunt()) == 2
        _edit(folder / "layers_of_mine.py", "nn.ReLU()", "nn.ReLU6()")
        with pytest.raises(ValueError, match=r"other code \(layers_of_mine\.py has changed: block\)"):
            hunt()


def _train(model: nn.Module, level: Level) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    level.begin(optimizer)
    for _ in level.steps(2):
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"val/accuracy": 0.5}


def half_precision() -> None:
    """A network trained in bf16, and the same one scored again: before, up to a point apart."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        trainer = {"max_epochs": 1, "accelerator": "cpu", "precision": "bf16-mixed"}
        net = MLP(64, (8,), 10)
        trained = fit(net, Digits(batch_size=64), trainer=trainer, out=Path(name) / "a")["metrics"]
        plain = module_for(load(Path(name) / "a"), Digits(batch_size=64))
        assert evaluate(plain, Digits(batch_size=64), Path(name)) == trained
        half = load(Path(name) / "a").to(torch.bfloat16)
        compact.save(half, Path(name) / "half" / "compact")
        sources = [Source(Path(name) / each) for each in ("a", "half")]
        found = compare(sources[0], sources, Digits(batch_size=64))["comparison"]["students"]
        wide = module_for(load(Path(name) / "half").float(), Digits(batch_size=64))
        expected = evaluate(wide, Digits(batch_size=64), Path(name))
        assert math.isclose(found[str(sources[1])]["accuracy"], expected["test/accuracy"], abs_tol=1e-6)
        assert math.isclose(found[str(sources[1])]["nll"], expected["test/loss"], abs_tol=1e-5)


def recommended_is_exported() -> None:
    """The page recommends a level and the export takes it: before, the last one."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(name) / "r.yaml").write_text(HUNT)
        _, exported = run(recipe.read(Path(name) / "r.yaml"), Path(name) / "out")
        (hunt, _) = read_run(Path(name) / "out")
        summary = gather(read_run(Path(name) / "out"))
        pick = hunt_of(hunt, summary.metrics[hunt.monitor]).pick
        assert pick is not None
        assert exported["level"] == pick.level.level == 1
        assert exported["metrics"] == pick.level.metrics


HUNT = """
data: {class_path: workbench.data.Digits, init_args: {batch_size: 128}}
trainer: {max_epochs: 2, accelerator: cpu}
hunt:
  job: hunt
  model: {class_path: workbench.models.MLP, init_args: {in_features: 64, hidden: [16], classes: 10}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-2}}
  levels: {density: [0.9, 0.002], tolerance: 0.05}
  rewind: {at: 1it}
  controls: {diagnose: false}
file: {job: export, of: hunt}
"""


def reason() -> None:
    """A level at half the dense network's accuracy: the sentence says against what, and how far."""
    ticket, reinit = [0.50, 0.51, 0.49, 0.50], [0.45, 0.46, 0.44, 0.46]
    ((level,),) = judged([[LevelScores(ticket, {"level 0": [0.97, 0.96, 0.97, 0.98]}, {"reinit": reinit})]], delta=0.01)
    levels = [replace(level, level=1, density=0.05)]
    verdict = Verdict("", ["a"], [None], [0, 1, 2, 3], "test/accuracy", True, 0.01, levels)
    said = sentence(verdict).replace("\N{MINUS SIGN}", "-")
    assert "it is more than delta below level 0 (against level 0 -47.00 points, " in said
    assert said.endswith("delta 1 point).")


SETUPS = [
    Setup("better by less than delta", "an advantage of .003 at delta .02", a_small_advantage),
    Setup("diverged arms", "dense in every seed", dense_diverged),
    Setup("diverged arms", "every control", controls_diverged),
    Setup("many levels", "twelve without any ticket", twelve_levels),
    Setup("many levels", "groups of hunts", groups),
    Setup("early bird", "unrelated masks at a low density", unrelated_masks),
    Setup("an edited network", "forward edited under a recipe", forward_edited),
    Setup("an edited network", "a helper beside it edited", helper_edited),
    Setup("one scoring", "half precision against full", half_precision),
    Setup("one scoring", "the recommended level is exported", recommended_is_exported),
    Setup("one scoring", "why a level is no ticket", reason),
]
