"""A level that ends early ends with its best weights, also when it was stopped on its way, and says so."""

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from prune.tickets.early_stop import EarlyStop, best_of
from prune.tickets.lightning import LightningTrainee
from tests.helpers import hunt_training
from tests.helpers.hunt_training import BATCHES, SGD, Blobs, Net, Stop, Watch, run_hunt, same, weights
from tests.helpers.ranks import on_ranks
from workbench.duration import Duration
from workbench.tasks import Classification
from workbench.training.fit import module_for
from workbench.training.loop import train

SCORES = [0.5, 0.7, 0.7, 0.6, 0.9, 0.8, 0.1, 0.2, 0.3]


class Scored(lp.Callback):
    """Gives every epoch a validation score, and remembers the weights at its end."""

    def __init__(self, scores: list[float] = SCORES) -> None:
        self.scores, self.after = scores, {}  # type: ignore[var-annotated]

    def __deepcopy__(self, memo: Any) -> "Scored":
        return self

    def on_validation_epoch_end(self, trainer: lp.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.log("val/given", self.scores[min(trainer.current_epoch, len(self.scores) - 1)])
            state = {name: value.clone() for name, value in pl_module.network.state_dict().items()}
            self.after[trainer.current_epoch] = state


class Judged(Classification):
    monitor = ("given", "max")  # type: ignore[assignment]


class Unvalidated(lp.LightningDataModule):
    def train_dataloader(self) -> Any:
        return Blobs().train_dataloader()


def trainee(out: Path, **options: Any) -> LightningTrainee:
    torch.manual_seed(1)
    of = module_for(Net(), Blobs(), task=Judged(3), optimizer=SGD)
    return hunt_training.trainee(out, of, **options)


def expected(scores: list[float], patience: int, after: int) -> tuple[int, int]:
    """Epochs trained, and the index of the best one: by the definition, over the whole list."""
    for end in range(after + 1, len(scores) + 1):
        seen = scores[after:end]
        best = after + max(range(len(seen)), key=lambda i: (seen[i], -i))
        if end - 1 - best >= patience:
            return end, best
    return len(scores), best


@pytest.mark.parametrize(("patience", "rewind"), [(1, "0it"), (3, "0it"), (2, "2ep")])
def test_a_level_ends_after_its_patience_with_its_best_weights(tmp_path: Path, patience: int, rewind: str) -> None:
    scored = Scored()
    of = trainee(
        tmp_path, rewind=rewind, early_stop=patience, trainer={"max_epochs": len(SCORES), "callbacks": [scored]}
    )
    epochs, best = expected(SCORES, patience, {"0it": 0, "2ep": 2}[rewind])
    levels = run_hunt(tmp_path, of, (1.0, 0.5))
    for level, record in enumerate(levels):
        assert record["stopped"] == {
            "epoch": epochs,
            "step": epochs * BATCHES,
            "best_step": (best + 1) * BATCHES,
        }
        assert len(record["history"]) == epochs
        if level == 1:  # the callback remembers the last level
            assert same(weights(tmp_path, 1), scored.after[best])
        assert record["metrics"]["val/loss"] == pytest.approx(record["history"][best]["val/loss"])


def test_lower_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    stop = EarlyStop(2, Duration(0, "it"), ("given", "min"))
    of = trainee(tmp_path)
    scores = [0.5, 0.3, math.nan, 0.4, 0.1]
    _fit(of, tmp_path, stop, Scored(scores), max_epochs=5)
    assert stop.ended == {"epoch": 4, "step": 4 * BATCHES, "best_step": 2 * BATCHES}


def test_scores_that_are_never_finite_leave_the_last_weights(tmp_path: Path) -> None:
    stop, scored = EarlyStop(2, Duration(0, "it"), ("given", "max")), Scored([math.nan])
    of = trainee(tmp_path)
    _fit(of, tmp_path, stop, scored, max_epochs=5)
    assert stop.ended == {"epoch": 2, "step": 2 * BATCHES, "best_step": None}
    assert same(dict(of.network.state_dict()), scored.after[1])


class StopAtEnd(lp.Callback):
    """Stops once, between the last epoch's checkpoint and that of the end."""

    armed = True

    def on_train_end(self, *_: Any) -> None:
        if StopAtEnd.armed:
            StopAtEnd.armed = False
            raise Stop


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    StopAtEnd.armed = True
    options: dict[str, Any] = {"early_stop": 2, "rewind": "3it"}
    length = {"max_epochs": len(SCORES)}
    whole = run_hunt(
        tmp_path / "a", trainee(tmp_path / "a", trainer={**length, "callbacks": [Scored()]}, **options), (1.0, 0.5)
    )
    for left in [20, 9, 0, 13, 0]:
        callbacks = [Scored(), Watch(left), StopAtEnd()]
        of = trainee(tmp_path / "b", trainer={**length, "callbacks": callbacks}, **options)
        try:
            pieces = run_hunt(tmp_path / "b", of, (1.0, 0.5))
        except Stop:
            continue
    assert not StopAtEnd.armed
    for level in (0, 1):
        assert same(weights(tmp_path / "a", level), weights(tmp_path / "b", level))
        for key in ("stopped", "metrics", "history", "best"):
            assert whole[level][key] == pieces[level][key]


def test_resumed_at_the_very_end_of_the_budget_it_still_gives_the_best_weights(tmp_path: Path) -> None:
    """Lightning then calls no end of training."""

    StopAtEnd.armed = True

    def run(out: Path, *more: lp.Callback) -> list[dict[str, Any]]:
        length = {"max_epochs": 3, "callbacks": [Scored([0.5, 0.9, 0.6]), *more]}
        return run_hunt(out, trainee(out, early_stop=5, trainer=length), (1.0, 0.5), mode="fine_tuning")

    whole = run(tmp_path / "a")
    with pytest.raises(Stop):
        run(tmp_path / "b", StopAtEnd())
    pieces = run(tmp_path / "b")
    for level in (0, 1):
        assert same(weights(tmp_path / "a", level), weights(tmp_path / "b", level))
        assert whole[level]["stopped"] == pieces[level]["stopped"]
    assert whole[0]["stopped"]["best_step"] == 2 * BATCHES


def test_without_validation_it_is_refused_before_training(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore", ".*no `val_dataloader`")
    for options in ({"data": Unvalidated()}, {"trainer": {"limit_val_batches": 0}}):
        with pytest.raises(ValueError, match="early_stop is 2, but nothing is validated: give the data module"):
            run_hunt(tmp_path, trainee(tmp_path, early_stop=2, **options))
    assert not list(tmp_path.rglob("last.ckpt"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early_stop is 0: give a number of validations"):
        EarlyStop(0, Duration(0, "it"), ("loss", "min"))
    with pytest.raises(ValueError, match=r"goes by val/perplexity, which is not logged, only .*'val/accuracy'"):
        _fit(trainee(tmp_path), tmp_path, EarlyStop(1, Duration(0, "it"), ("perplexity", "min")), max_epochs=1)

    class MyWeightAveraging(lp.Callback):
        pass

    average = MyWeightAveraging()
    with pytest.raises(ValueError, match="MyWeightAveraging ends with an average: use one"):
        _fit(trainee(tmp_path), tmp_path, EarlyStop(1, Duration(0, "it"), ("loss", "min")), average, max_epochs=1)


def test_ranks_agree_on_scores_of_their_own() -> None:
    """Rank 0 alone would go on improving, rank 1 alone would stop after its first."""
    both = on_ranks(_ranks)
    assert both[0] == both[1] == {"epoch": 4, "step": 4 * BATCHES // 2, "best_step": 2 * BATCHES // 2}


def _ranks() -> Any:
    own = [0.1, 0.2, 0.3, 0.4, 0.5] if os.environ["RANK"] == "0" else [0.9, 0.9, 0.5, 0.5, 0.5]
    stop = EarlyStop(2, Duration(0, "it"), ("given", "max"))
    warnings.filterwarnings("ignore", ".*sync_dist=True")
    with tempfile.TemporaryDirectory() as folder:
        of = trainee(Path(folder), trainer={"devices": 2, "strategy": "ddp"})
        _fit(of, Path(folder), stop, Scored(own), max_epochs=5)
    return stop.ended


def _fit(of: Any, out: Path, *callbacks: Any, **options: Any) -> None:
    early, *theirs = callbacks
    given = {**of.trainer, **options, "callbacks": theirs}
    train(of.module, of.data, trainer=given, seed=1, out=out, callbacks=[early])


def test_best_is_the_first_lowest_validation_loss_of_this_training() -> None:
    rows = [{"step": 2, "val/loss": 0.1}, {"step": 4, "val/loss": 0.5}, {"step": 6, "val/loss": math.nan}, {"step": 8}]
    rows += [{"step": 10, "val/loss": 0.4}, {"step": 12, "val/loss": 0.4}]
    assert best_of(rows) == {"step": 2, "score": 0.1}
    assert best_of(rows, after=2) == {"step": 10, "score": 0.4}
    assert best_of(rows, after=12) is None
    assert best_of([{"step": 1, "train/loss": 0.5}]) is None
