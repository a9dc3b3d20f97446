"""The best checkpoints, and patience, are those of networks at the final density."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch

from prune import DynamicSparsity, GradualPruning, KeepMasked, LotteryTicket
from prune.callbacks.best import Held, forget, names, of_denser
from prune.levels import Levels
from tests.helpers.lightning_training import fit, masks, user_module
from tests.helpers.trainers import BOTH


def getting_worse(namespace: Any = lp) -> Any:
    """Logs its epoch as what is to be low."""
    module: Any = user_module(namespace)
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        module.log("val", float(module.current_epoch), on_epoch=True, on_step=False)
        return step(batch, batch_idx)

    module.training_step = training_step
    return module


def pruning(end: str = "3ep") -> GradualPruning:
    return GradualPruning(0.25, "1ep", end, "1ep")


def alive(path: Any) -> float:
    state = torch.load(path, weights_only=False)["state_dict"]
    matrices = [value for value in state.values() if value.ndim > 1]
    return sum(int(value.count_nonzero()) for value in matrices) / sum(value.numel() for value in matrices)


def epochs(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir())


@BOTH
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_one_at_the_final_density(namespace: Any, mode: Any, tmp_path: Path) -> None:
    keep = namespace.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val", mode=mode, save_top_k=2)
    fit(getting_worse(namespace), keep, pruning(), namespace=namespace, max_epochs=5)
    best = {"min": ["epoch=2", "epoch=3"], "max": ["epoch=3", "epoch=4"]}[mode]
    assert epochs(tmp_path) == best
    assert Path(keep.best_model_path).stem == (best[0] if mode == "min" else best[1])
    assert alive(keep.best_model_path) == pytest.approx(0.25, abs=0.01)
    assert float(keep.best_model_score) in (2, 4)


def test_every_checkpoint_is_there_to_resume_from_until_then(tmp_path: Path) -> None:
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val", save_top_k=-1)
    fit(getting_worse(), keep, pruning(), max_epochs=5)
    assert epochs(tmp_path) == [f"epoch={epoch}" for epoch in range(5)]
    assert Path(keep.best_model_path).stem == "epoch=2"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_training_knows_what_counts(tmp_path: Path) -> None:
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val", save_last=True)
    with pytest.warns(UserWarning, match=r"training ended with density 0\.34\d*, not 0\.25"):
        fit(getting_worse(), stopped := pruning(), keep, StopEarly(), max_epochs=6)
    assert stopped.masks is not None
    again = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val", save_last=True)
    fit(getting_worse(), pruning(), again, StopEarly(9), max_epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert alive(again.best_model_path) == pytest.approx(0.25, abs=0.01)


class StopEarly(lp.Callback):
    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def test_a_training_whose_last_pruning_no_score_follows_says_so(tmp_path: Path) -> None:
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val", every_n_epochs=2)
    said = r"the best checkpoint of ModelCheckpoint\(monitor='val'\) is of a denser network: .* instead of .*epoch=1"
    with pytest.warns(UserWarning, match=said):
        fit(getting_worse(), pruning(), keep, max_epochs=3)


@BOTH
def test_patience_begins_at_the_final_density(namespace: Any) -> None:
    stop = namespace.callbacks.EarlyStopping("val", patience=1, stopping_threshold=1.0)
    fit(getting_worse(namespace), stop, pruning(), namespace=namespace, max_epochs=9)
    assert stop.stopped_epoch == 3
    assert stop.stopping_threshold == 1.0


def test_a_score_that_is_not_finite_still_stops() -> None:
    module: Any = user_module()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        module.log("val", float("nan"), on_epoch=True, on_step=False)
        return step(batch, batch_idx)

    module.training_step = training_step
    with pytest.warns(UserWarning, match="training ended with density 1, not"):
        fit(module, lp.callbacks.EarlyStopping("val"), pruning(), max_epochs=5)


def test_a_threshold_is_given_back_after_an_exception() -> None:
    class Fails(lp.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert stop.stopping_threshold is None
            raise RuntimeError("power failure")

    stop = lp.callbacks.EarlyStopping("val", stopping_threshold=0.5)
    with pytest.raises(RuntimeError, match="power failure"):
        fit(getting_worse(), pruning(), stop, Fails(), max_epochs=5)
    assert stop.stopping_threshold == 0.5


@pytest.mark.parametrize("make", [lambda: KeepMasked(masks()), lambda: DynamicSparsity(0.3, "0ep", "2ep", "2it")])
def test_a_constant_density_holds_nothing_back(make: Any, tmp_path: Path) -> None:
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val")
    stop = lp.callbacks.EarlyStopping("val", patience=2)
    fit(getting_worse(), make(), keep, stop, max_epochs=5)
    assert stop.stopped_epoch == 2
    assert Path(keep.best_model_path).stem == "epoch=0"


def test_levels_have_their_own(tmp_path: Path) -> None:
    keep = lp.callbacks.ModelCheckpoint(tmp_path, "{level:.0f}-{epoch}", monitor="val")
    stop = lp.callbacks.EarlyStopping("val", patience=1, stopping_threshold=-1.0)
    ticket = LotteryTicket(Levels(2, rate=0.5), rewind="1ep")
    fit(getting_worse(), ticket, keep, stop, max_epochs=4)
    assert [row["stopped"] for row in ticket.levels] == [True] * 3
    assert alive(keep.best_model_path) == pytest.approx(0.25, abs=0.01)


def test_what_is_forgotten() -> None:
    keep = lp.callbacks.ModelCheckpoint(monitor="val", mode="max", save_top_k=3)
    plain, stop = lp.callbacks.ModelCheckpoint(), lp.callbacks.EarlyStopping("loss", mode="max")
    trainer = lp.Trainer(callbacks=[keep, plain, stop], accelerator="cpu", logger=False)
    forget(trainer)
    assert keep.best_model_score is None  # nothing was saved
    keep.best_k_models, keep.best_model_path, keep.best_model_score = {"a": torch.tensor(0.5)}, "a", torch.tensor(0.5)
    assert list(of_denser(trainer)) == []
    forget(trainer)
    assert dict(of_denser(trainer)) == {keep: "a"}
    assert float(stop.best_score) == -torch.inf
    assert names([keep, stop]) == "ModelCheckpoint(monitor='val') and EarlyStopping(monitor='loss')"
    held = Held()
    held.hold(trainer)
    held.hold(trainer)
    held.release()
    assert stop.stopping_threshold is None


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_another_scope_is_refused_when_resumed(tmp_path: Path) -> None:
    trainer = fit(getting_worse(), pruning(), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = GradualPruning(0.25, "1ep", "3ep", "1ep", prune_but_the_first())
    with pytest.raises(ValueError, match=r"trained with GradualPruning, and .*exclude \['0\.\*'\] is given: resume"):
        fit(getting_worse(), other, max_epochs=6, ckpt_path=tmp_path / "last.ckpt")


def prune_but_the_first() -> Any:
    from prune import Pruner

    return Pruner(exclude="0.*")


def test_a_sparse_network_that_would_grow_again_is_named() -> None:
    module = getting_worse()
    masks(0.3).apply(module.network)
    with pytest.warns(UserWarning, match=r"70\.0% of the weights of .* are exactly 0, but this Gradual has no state"):
        fit(module, pruning(), max_epochs=4)
    module = getting_worse()
    masks(0.5).apply(module.network)
    fit(module, GradualPruning(0.25, "0ep", "3ep", "1ep", initial=0.5), max_epochs=4)  # goes on from there
