"""Training that was stopped ends where undisturbed training ends, bit for bit."""

import functools
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.trainers import Stop, StopAt
from workbench import load
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.duration import Duration
from workbench.models import MLP
from workbench.randomness import random_state, set_random_state
from workbench.training import CPUThreads
from workbench.training.fit import fit, module_for, pretrained
from workbench.training.loop import make_trainer, train

CPU = {"accelerator": "cpu", "enable_progress_bar": False}
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)


class Noisy(nn.Module):
    """Random in training, with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def run(out: Path, stops: tuple[int, ...], checkpoint: str, scheduler: Any, trainer: dict[str, Any]) -> tuple:
    """Train; stop after those batches and start again each time, in a module built anew."""
    for stop in (*stops, None):
        lp.seed_everything(5, verbose=False)
        module = module_for(Noisy(), data := Digits(batch_size=128), optimizer=SGD, lr_scheduler=scheduler)
        try:
            result = train(
                module,
                data,
                trainer={**CPU, **trainer},
                seed=5,
                out=out,
                checkpoint=Duration.parse(checkpoint),
                callbacks=[] if stop is None else [StopAt(stop)],
            )
        except Stop:
            continue
        return module.state_dict(), result
    raise AssertionError("never finished")


CASES = {
    "epoch": ((13,), "1ep", None, {"max_epochs": 3}),
    "first epoch": ((4,), "1ep", None, {"max_epochs": 2}),
    "steps": ((4, 9, 17), "3it", None, {"max_epochs": 3}),
    "steps at the epoch's end": ((11,), "5it", None, {"max_epochs": 3}),
    "cosine": (
        (13,),
        "1ep",
        functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3),
        {"max_epochs": 3},
    ),
    "plateau": (
        (13,),
        "1ep",
        functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.9),
        {"max_epochs": 3},
    ),
    "plateau in the middle": (
        (14,),
        "6it",
        functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.9),
        {"max_epochs": 3},
    ),
    "accumulation": ((7, 15), "2it", None, {"max_epochs": 2, "accumulate_grad_batches": 3}),
    "limited batches": ((9,), "2it", None, {"max_epochs": 3, "limit_train_batches": 4}),
    "max_steps": ((14,), "1ep", None, {"max_steps": 17}),
    "rare validation": ((25,), "1ep", None, {"max_epochs": 3, "check_val_every_n_epoch": 2}),
    "clipping": ((13,), "4it", None, {"max_epochs": 2, "gradient_clip_val": 0.5}),
}


@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_stopped_training_ends_as_undisturbed_training(tmp_path: Path, case: str) -> None:
    stops, checkpoint, scheduler, trainer = CASES[case]
    expected, whole = run(tmp_path / "whole", (), checkpoint, scheduler, trainer)
    found, pieces = run(tmp_path / "pieces", stops, checkpoint, scheduler, trainer)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert pieces["metrics"] == whole["metrics"]
    assert pieces["history"] == whole["history"]
    assert whole["history"], "an epoch has a row"


def test_seed_decides_everything(tmp_path: Path) -> None:
    def weights(seed: int, name: str) -> dict[str, torch.Tensor]:
        lp.seed_everything(0, verbose=False)
        module = module_for(Noisy(), data := Digits(batch_size=256))
        train(module, data, trainer={**CPU, "max_epochs": 1}, seed=seed, out=tmp_path / name)
        return module.state_dict()

    a, b, c = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


class Own(lp.LightningModule):
    """Somebody's module: its own loss, optimizer, and a shuffled loader in a data module of their own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OwnData(lp.LightningDataModule):
    """Shuffles with torch's global generator, as most people do."""

    def _loader(self, shuffle: bool) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(70, 5, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self._loader(True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(False)


def test_validation_moves_no_random_number_of_training(tmp_path: Path) -> None:
    """A plain validation loader draws from torch's generator, and so would change dropout."""

    def weights(limit: int) -> dict[str, torch.Tensor]:
        lp.seed_everything(3, verbose=False)
        module = Own()
        trainer = {**CPU, "max_epochs": 2, "limit_val_batches": limit}
        train(module, OwnData(), trainer=trainer, seed=3, out=tmp_path / str(limit))
        return module.state_dict()

    expected = weights(0)
    assert all(torch.equal(value, expected[name]) for name, value in weights(2).items())


@pytest.mark.parametrize("stop", [3, 7, 12])
def test_an_own_module_resumes_in_the_middle_of_an_epoch(tmp_path: Path, stop: int) -> None:
    def weights(name: str, stops: tuple[int | None, ...]) -> dict[str, torch.Tensor]:
        for at in stops:
            lp.seed_everything(3, verbose=False)
            module = Own()
            try:
                train(
                    module,
                    OwnData(),
                    trainer={**CPU, "max_epochs": 3},
                    seed=3,
                    out=tmp_path / name,
                    checkpoint=Duration.parse("2it"),
                    callbacks=[] if at is None else [StopAt(at)],
                )
            except Stop:
                continue
            return module.state_dict()
        raise AssertionError

    whole, pieces = weights("whole", (None,)), weights("pieces", (stop, None))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_fit_writes_a_checkpoint_of_what_it_trained(tmp_path: Path) -> None:
    model = MLP(64, [16], 10)
    result = fit(model, Digits(batch_size=256), trainer={**CPU, "max_epochs": 1}, out=tmp_path)
    back = load(tmp_path)
    x = torch.randn(7, 64)
    assert torch.equal(back(x), model.eval()(x))
    assert set(result["metrics"]) >= {"val/accuracy", "val/loss", "test/accuracy", "test/loss"}
    assert result["monitor"] == ["accuracy", "max"]
    outputs = compact.read_index(compact.find(tmp_path))["provenance"]["outputs"]
    assert outputs == {"kind": "classes", "class_dim": -1}
    assert result["size"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert "kept" not in result["size"], "nothing was pruned, so nothing was kept"
    assert result["size"]["checkpoint_bytes"] == sum(f.stat().st_size for f in compact.find(tmp_path).iterdir())


def test_an_own_module_keeps_its_optimizer_unless_given_one(tmp_path: Path) -> None:
    fit(Own(), OwnData(), trainer={**CPU, "max_epochs": 1}, out=tmp_path / "own")
    module = Own()
    fit(module, OwnData(), optimizer=SGD, trainer={**CPU, "max_epochs": 1}, out=tmp_path / "given")
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)
    assert isinstance(load(tmp_path / "own"), Own)
    with pytest.raises(ValueError, match="lr_scheduler is given without optimizer"):
        fit(
            Own(),
            OwnData(),
            lr_scheduler=torch.optim.lr_scheduler.LinearLR,
            trainer={"max_epochs": 1},
            out=tmp_path,
        )


def test_user_callbacks_and_their_state_come_along(tmp_path: Path) -> None:
    stopper = lp.callbacks.EarlyStopping("val/loss", patience=0, min_delta=1e9)
    given = {**CPU, "max_epochs": 9, "callbacks": [stopper]}
    lp.seed_everything(0, verbose=False)
    result = train(module_for(Noisy(), data := Digits(batch_size=256)), data, trainer=given, seed=0, out=tmp_path)
    assert len(result["history"]) == 2
    assert stopper.stopped_epoch == 0, "the caller's callback was not touched: every training has its own"


def test_random_state_round_trip() -> None:
    state = random_state()
    first = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one is what is stored
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == first  # noqa: NPY002


def test_no_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither max_epochs nor max_steps"):
        make_trainer({"accelerator": "cpu"}, [], tmp_path)


def test_no_task_and_no_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OwnData has no attribute 'classes'"):
        fit(nn.Linear(5, 1), OwnData(), trainer={"max_epochs": 1}, out=tmp_path)


def test_a_foreign_lightning_module_is_refused(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    class Foreign(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match=r"from lightning\.pytorch import LightningModule"):
        fit(Foreign(), OwnData(), trainer={"max_epochs": 1}, out=tmp_path)


def test_a_checkpoint_never_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1ep or 1it"):
        fit(Own(), OwnData(), trainer={"max_epochs": 1}, checkpoint=Duration(0, "ep"), out=tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """Lightning writes in place: a full disk left half a file under the name that the next run resumes from."""

    class Full(lp.Callback):
        def on_train_epoch_start(self, trainer: lp.Trainer, module: Any) -> None:
            if trainer.current_epoch == 1:
                save = trainer.strategy.save_checkpoint

                def fail(checkpoint: Any, path: Path, **options: Any) -> None:
                    save(checkpoint, path, **options)
                    path.write_bytes(path.read_bytes()[:100])
                    raise OSError(28, "No space left on device")

                trainer.strategy.save_checkpoint = fail  # type: ignore[method-assign]

    def weights(out: Path, *callbacks: lp.Callback) -> dict[str, torch.Tensor]:
        lp.seed_everything(5, verbose=False)
        module = module_for(Noisy(), data := Digits(batch_size=256))
        train(module, data, trainer={**CPU, "max_epochs": 2}, seed=5, out=out, callbacks=callbacks)
        return module.state_dict()

    with pytest.raises(OSError, match="No space left"):
        weights(tmp_path / "pieces", Full())
    assert [path.name for path in (tmp_path / "pieces" / "checkpoints").iterdir()] == ["last.ckpt"]
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_cpu_threads_are_given_back(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(lp.Callback):
        def on_train_start(self, *_: Any) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    trainer = {**CPU, "max_epochs": 1, "callbacks": [CPUThreads(before + 1)]}
    train(module_for(Noisy(), data := Digits()), data, trainer=trainer, seed=0, out=tmp_path, callbacks=[Watch()])
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least one thread"):
        CPUThreads(0)


def test_a_training_that_ended_early_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its end and its record, it must not train past the early stop."""

    def weights(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        lp.seed_everything(5, verbose=False)
        stopper = lp.callbacks.EarlyStopping("val/loss", patience=0, min_delta=0.2)
        module = module_for(Noisy(), data := Digits(batch_size=256), optimizer=SGD)
        result = train(module, data, trainer={**CPU, "max_epochs": 30, "callbacks": [stopper]}, seed=5, out=out)
        return module.state_dict(), result

    whole, expected = weights(tmp_path / "whole")
    assert 1 < len(expected["history"]) < 30

    def killed(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("workbench.training.loop._metrics", killed)
        with pytest.raises(Stop):
            weights(tmp_path / "pieces")
    pieces, found = weights(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert (found["metrics"], found["history"]) == (expected["metrics"], expected["history"])


@pytest.mark.parametrize("budget", [{"max_epochs": 0}, {"max_epochs": 1, "limit_train_batches": 0}])
def test_a_training_without_a_step_is_refused(tmp_path: Path, budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="took no step"):
        train(module_for(Noisy(), data := Digits()), data, trainer={**CPU, **budget}, seed=0, out=tmp_path)


def test_a_network_that_is_trained_already_is_a_stage(tmp_path: Path) -> None:
    network = MLP(64, [8], 10)
    result = pretrained(network, Digits(256), out=tmp_path / "scored")
    assert {"val/accuracy", "test/accuracy"} <= result["metrics"].keys()
    assert result["size"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert (tmp_path / "scored" / "example.safetensors").is_file()
    assert pretrained(network, out=tmp_path / "bare")["metrics"] == {}
    assert not (tmp_path / "bare" / "example.safetensors").exists()
    for name in ("scored", "bare"):
        loaded = load(tmp_path / name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
