import copy
import functools
import math
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.ranks import free_port
from tests.helpers.trainers import QUIET, Stop, StopAt
from workbench.data import Digits
from workbench.duration import Duration
from workbench.models import MLP
from workbench.tasks import Classification, LanguageModelling
from workbench.training.loop import train
from workbench.training.module import SupervisedModule, TaskModule, network_of, with_optimizer

BATCHES = [5, 5, 5, 2]  # the last one is small: a mean of means would be another number


class Seen(lp.Callback):
    """What an ordinary callback finds at the end of an epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class SeenLate(Seen, Checkpoint):
    """The same after the module's own hook."""


def loader() -> DataLoader:
    x, y = torch.randn(17, 6), torch.randint(0, 3, (17,))
    return DataLoader(TensorDataset(x, y), 5)


def module(**options: Any) -> TaskModule:
    torch.manual_seed(1)
    return TaskModule(MLP(6, [4], 3), Classification(3), functools.partial(torch.optim.SGD, lr=0.1), **options)


def fit(subject: lp.LightningModule, data: Any, *callbacks: lp.Callback, ckpt_path: Any = None, **options: Any) -> Any:
    keeping = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = lp.Trainer(
        **{"max_epochs": 2, **QUIET, "enable_checkpointing": keeping, **options}, callbacks=[*callbacks]
    )
    trainer.fit(subject, data, data, ckpt_path=ckpt_path)
    return trainer


def test_the_training_loss_is_the_mean_over_samples_of_what_every_batch_had() -> None:
    data, seen, subject = loader(), Seen(), module()
    losses: list[Tensor] = []
    original = subject.step
    subject.step = lambda batch: (losses.append((step := original(batch)).loss.detach()), step)[1]  # type: ignore[method-assign]
    fit(subject, data, seen)
    for epoch in range(2):
        mine = losses[4 * epoch : 4 * epoch + 4]
        expected = sum(float(loss) * size for loss, size in zip(mine, BATCHES)) / 17
        assert seen.rows[epoch]["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_ignored_positions_do_not_weigh() -> None:
    x, y = torch.randn(8, 6), torch.tensor([0, 1, 2, 0, 1, -1, -1, -1])
    subject = TaskModule(MLP(6, [4], 3), Classification(3, ignore_index=-1), functools.partial(torch.optim.SGD, lr=0.0))
    seen = Seen()
    fit(subject, DataLoader(TensorDataset(x, y), 4), seen, max_epochs=1)
    expected = nn.functional.cross_entropy(subject.network(x), y, ignore_index=-1).item()
    for name in ("train/loss", "val/loss", "val/nll"):
        assert seen.rows[0][name] == pytest.approx(expected, rel=1e-5)


def test_validation_and_test_are_means_over_the_split_and_start_anew() -> None:
    data, subject = loader(), module()
    trainer = fit(subject, data)
    x, y = data.dataset.tensors  # type: ignore[attr-defined]
    loss = nn.functional.cross_entropy(subject.network(x), y).item()
    accuracy = float((subject.network(x).argmax(-1) == y).float().mean())
    for _ in range(2):
        (row,) = trainer.validate(subject, data, verbose=False)
        assert row == pytest.approx({"val/loss": loss, "val/nll": loss, "val/accuracy": accuracy}, rel=1e-5)
        (row,) = trainer.test(subject, data, verbose=False)
        assert row == pytest.approx({"test/loss": loss, "test/nll": loss, "test/accuracy": accuracy}, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_epochs": None, "max_steps": 6}, {"accumulate_grad_batches": 3}])
def test_ordinary_callbacks_see_the_epoch_that_ends(options: dict[str, Any]) -> None:
    """Lightning runs their `on_train_epoch_end` before the module's: a value logged there would be an epoch old."""
    early, late = Seen(), SeenLate()
    fit(module(), loader(), early, late, **options)
    assert early.rows == late.rows
    assert len({row["train/loss"] for row in early.rows}) == len(early.rows) == 2


def test_an_epoch_broken_off_is_logged_too() -> None:
    class Enough(lp.Callback):
        def on_train_batch_end(self, trainer: lp.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    late = SeenLate()
    trainer = fit(module(), loader(), Enough(), late, limit_val_batches=0)
    assert trainer.global_step == 1
    assert late.rows[0]["train/loss"] > 0


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 8])
def test_resuming_in_the_middle_of_an_epoch_reports_the_whole_epoch(tmp_path: Path, stop: int) -> None:
    def run(out: Path, *stops: int) -> list[dict[str, float]]:
        for at in (*stops, None):
            lp.seed_everything(5, verbose=False)
            subject = TaskModule(MLP(64, [20], 10), Classification(10))
            callbacks = [] if at is None else [StopAt(at)]
            trainer = {**QUIET, "max_epochs": 2, "limit_train_batches": 4}
            try:
                return train(
                    subject,
                    Digits(128),
                    trainer=trainer,
                    seed=5,
                    out=out,
                    checkpoint=Duration.parse("1it"),
                    callbacks=callbacks,
                )["history"]
            except Stop:
                continue
        raise AssertionError("never finished")

    assert run(tmp_path / "pieces", stop) == run(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("batches", range(1, 9))
def test_resuming_with_a_plain_trainer(tmp_path: Path, batches: int) -> None:
    """From every batch: after the last one of an epoch Lightning skips `on_train_epoch_start` of the next."""

    class Resumable(DataLoader):
        at = 0

        def __iter__(self) -> Any:
            rows = list(super().__iter__())[self.at :]
            self.at = 0
            return iter(rows)

        def state_dict(self) -> dict[str, int]:
            return {"at": batches % 4}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    def data() -> DataLoader:
        torch.manual_seed(0)
        return Resumable(TensorDataset(torch.randn(17, 6), torch.randint(0, 3, (17,))), 5)

    options = {"max_epochs": 3, "limit_val_batches": 0}
    whole = SeenLate()
    fit(module(), data(), whole, **options)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module(), data(), keep, **options)
    rest = SeenLate()
    fit(module(), data(), rest, ckpt_path=tmp_path / f"step={batches}.ckpt", **options)
    assert rest.rows, "an epoch is reported"
    assert rest.rows == whole.rows[-len(rest.rows) :]
    assert len(rest.rows) == 3 - batches // 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_validation_time_reports_its_epoch_once_resumed(tmp_path: Path) -> None:
    whole = SeenLate()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    torch.manual_seed(0)
    data = loader()
    fit(module(), data, keep, whole, max_epochs=3)
    rest = SeenLate()
    fit(module(), data, rest, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert [row["train/loss"] for row in rest.rows] == [row["train/loss"] for row in whole.rows[-len(rest.rows) :]]


def test_a_second_fit_starts_its_means_anew() -> None:
    subject, data = module(), loader()
    with pytest.raises(Stop):
        fit(subject, data, StopAt(3))
    subject.load_state_dict(module().state_dict())
    again, fresh = Seen(), Seen()
    fit(subject, data, again)
    fit(module(), data, fresh)
    assert [row["train/loss"] for row in again.rows] == [row["train/loss"] for row in fresh.rows]


def test_no_step_is_logged_through_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a quarter of a small network's step."""
    calls: list[str] = []
    subject = module()
    original = subject.log
    monkeypatch.setattr(subject, "log", lambda name, *args, **more: (calls.append(name), original(name, *args, **more)))
    fit(subject, loader(), max_epochs=1, limit_val_batches=0)
    assert calls == ["train/loss"]


def test_a_network_in_eval_mode_is_woken() -> None:
    """Pitfall 1: from_pretrained returns one, and Lightning leaves it asleep."""
    network = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).eval()
    subject = TaskModule(network, Classification(3))
    assert all(part.training for part in subject.modules())
    modes: list[bool] = []
    network.register_forward_hook(lambda *_: modes.append(network[1].training))
    fit(subject, loader(), max_epochs=1, num_sanity_val_steps=0)
    assert modes == [True] * 4 + [False] * 4


def test_training_step_needs_no_trainer() -> None:
    subject = module()
    batch = next(iter(loader()))
    subject.training_step(batch, 0).backward()
    assert subject.means["train"].local()["loss"][1] == 5


def test_nothing_but_the_network_is_in_the_state_dict() -> None:
    subject = module()
    assert {name.partition(".")[0] for name in subject.state_dict()} == {"network"}
    assert copy.deepcopy(subject).state_dict().keys() == subject.state_dict().keys()


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    subject = module()
    subject.network.layers[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    (group,) = subject.configure_optimizers().param_groups
    assert len(group["params"]) == 3


def test_a_module_without_a_step_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SupervisedModule(MLP(6, [4], 3), Classification(3))  # type: ignore[abstract]


def test_scheduler_without_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="lr_scheduler is given without optimizer"):
        with_optimizer(module(), None, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1))


def test_network_of() -> None:
    subject = module()
    assert network_of(subject) is subject.network
    assert network_of(subject.network) is subject.network


def _rank(rank: int, port: int, out: Path, results: Any) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()} | {"TORCHELASTIC_RUN_ID": "test"})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(17, 6), torch.randint(0, 3, (17,))
    mine = slice(0, 12) if rank == 0 else slice(12, 17)  # ranks of different sizes: their means do not weigh the same
    data = DataLoader(TensorDataset(x[mine], y[mine]), 6 if rank == 0 else 3)
    seen = Seen()
    keep = ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {**QUIET, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_epochs": 1}
    subject = TaskModule(MLP(6, [4], 3), Classification(3), functools.partial(torch.optim.SGD, lr=0.0))
    expected = nn.functional.cross_entropy(subject.network(x), y).item() if rank == 0 else 0.0
    lp.Trainer(**{**options, "enable_checkpointing": True}, callbacks=[seen, keep]).fit(subject, data, data)
    results.put((rank, expected, seen.rows[0]["train/loss"], seen.rows[0]["val/loss"]))
    if rank == 0:
        stored = torch.load(out / "step=1.ckpt", weights_only=True)["train_means"]["ranks"]
        results.put(("stored", [row["loss"][1] for row in stored]))
    torch.distributed.destroy_process_group()


def test_two_ranks_report_one_mean_over_all_samples(tmp_path: Path) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        ranks = [context.Process(target=_rank, args=(rank, port, tmp_path, results)) for rank in range(2)]
        for process in ranks:
            process.start()
    rows = [results.get(timeout=60) for _ in range(3)]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    expected = next(row[1] for row in rows if row[0] == 0)
    for row in rows:
        if row[0] == "stored":
            assert row[1] == [6.0, 3.0]
        else:
            assert row[2] == pytest.approx(expected, rel=1e-5)
            assert row[3] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("smoothing", "calls"), [(0.0, 1), (0.1, 2)])
def test_an_evaluated_batch_computes_each_cross_entropy_once(
    smoothing: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(7, (size, 5))} for size in (4, 1, 2)]
    task, network = LanguageModelling(7, label_smoothing=smoothing), nn.Embedding(7, 7)
    module, data = TaskModule(_Named(network), task), DataLoader(batches, batch_size=None)
    counted: list[Any] = []
    plain = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *a, **k: counted.append(a) or plain(*a, **k))
    for _ in range(2):  # the metrics of a split start anew
        counted.clear()
        logged = lp.Trainer(**QUIET).validate(module, data, verbose=False)[0]
        assert len(counted) == calls * len(batches)
        outputs = torch.cat([network(batch["input_ids"])[:, :-1].flatten(0, 1) for batch in batches])
        targets = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in batches])
        nll = plain(outputs, targets).item()
        assert logged["val/loss"] == pytest.approx(plain(outputs, targets, label_smoothing=smoothing).item())
        assert logged["val/nll"] == pytest.approx(nll)
        assert logged["val/perplexity"] == pytest.approx(math.exp(nll))
        assert logged["val/accuracy"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item())


class _Named(nn.Module):
    """A language model that takes its tokens by name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids)
