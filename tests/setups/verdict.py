"""What people ask of a verdict, of masks that stop moving, and of a recipe whose network they edit."""

import warnings

import lightning.pytorch as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune import EarlyBird, Pruner
from prune.tickets.judge import LevelScores, judged
from tests.setups.base import Setup

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


SETUPS = [
    Setup("better by less than delta", "an advantage of .003 at delta .02", a_small_advantage),
    Setup("diverged arms", "dense in every seed", dense_diverged),
    Setup("diverged arms", "every control", controls_diverged),
    Setup("many levels", "twelve without any ticket", twelve_levels),
    Setup("many levels", "groups of hunts", groups),
    Setup("early bird", "unrelated masks at a low density", unrelated_masks),
]
