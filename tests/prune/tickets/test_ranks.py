"""Hunts of two processes, data-parallel or with divided weights (FSDP2), against one process with batches as large."""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from prune.levels import Levels
from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.tickets.hunt import hunt
from tests.helpers.ranks import on_ranks, start_ranks
from workbench import load
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.models import MLP

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


class Blobs(lp.LightningDataModule):
    """Three classes in float64, as many as two processes share evenly."""

    classes = 3

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.size = batch_size

    def _loader(self, seed: int, shuffle: bool = False) -> Any:
        labels = torch.arange(96) % 3
        inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return DataLoader(TensorDataset(inputs + nn.functional.one_hot(labels, 8), labels), self.size, shuffle)

    def train_dataloader(self) -> Any:
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(1)


class Own(lp.LightningModule):
    """A module that divides itself."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)).double()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


class Stop(RuntimeError):
    pass


class At(lp.Callback):
    """Does something at one update of one level, counted over the whole hunt."""

    def __init__(self, left: list[int], act: Any) -> None:
        self.left, self.act = left, act

    def __deepcopy__(self, memo: Any) -> "At":
        return self

    def on_train_batch_end(self, *_: Any) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            self.act()


def hunted(out: Path, strategy: str = "", model: Any = None, at: lp.Callback | None = None, **options: Any) -> Any:
    """What two levels came to; on several ranks called on each."""
    warnings.simplefilter("ignore")
    lp.seed_everything(1, verbose=False)
    ranks: dict[str, Any] = {"devices": 2, "strategy": STRATEGIES[strategy]()} if strategy else {"devices": 1}
    trainer = {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, **ranks}
    found = hunt(
        model=MLP(8, [12], 3).double() if model is None else model(),
        data=Blobs(8 if strategy else 16),
        trainer={**trainer, "callbacks": [at] if at else []},
        out=out,
        seed_everything=1,
        checkpoint=Duration(4, "it"),
        **{"levels": Levels(2, rate=0.5), "rewind": Duration(3, "it"), **options},
    )
    levels = [
        {
            **level,
            **{
                f"{name} {key}": value
                for name, each in level.get("controls", {}).items()
                for key, value in each.items()
            },
        }
        for level in found["levels"]
    ]
    return [{key: value for key, value in level.items() if key.endswith(("mask_hash", "metrics"))} for level in levels]


def alike(one: Any, other: Any) -> None:
    """Masks equal, metrics as near as the order of sums lets them be."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key] == (pytest.approx(value, abs=1e-6) if key.endswith("metrics") else value), key


def files(out: Path) -> set[str]:
    """Names of all files, without what of them is the hash of weights, which differ in the last bits."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in found if "/weights-" not in name}


def weights(out: Path, level: int) -> dict[str, torch.Tensor]:
    return compact.tensors(out / f"level_{level:02d}")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"optimizer": ADAMW, "controls": ["shuffled", "reinit"]}),
    "fsdp2 from the first weights": (
        "fsdp2",
        {"optimizer": ADAMW, "rewind": Duration(0, "it"), "controls": ["reinit"]},
    ),
    "fsdp2": ("fsdp2", {"optimizer": ADAMW, "controls": ["random", "dense"]}),
    "fsdp2, a module of one's own": ("fsdp2", {"model": Own, "rewind": Rewind("3it", "learning_rate")}),
}
SLOW = list(CASES)[2:]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_two_processes_find_the_ticket_of_one(tmp_path: Path, case: str) -> None:
    strategy, options = CASES[case]
    one = hunted(tmp_path / "one", **options)
    two = on_ranks(functools.partial(hunted, **options), tmp_path / "two", strategy)
    alike(one, two[0])
    assert two[0] == two[1], "every rank knows the same"
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for level in range(3):
        mine, theirs = weights(tmp_path / "one", level), weights(tmp_path / "two", level)
        assert {name: value.shape for name, value in mine.items()} == {n: v.shape for n, v in theirs.items()}
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-9, rtol=0) for name in mine)
    if "model" not in options:
        assert type(load(tmp_path / "two")) is MLP, "what is shipped knows nothing of ranks"


def _stopped(out: Path, strategy: str, stops: list[int], **options: Any) -> Any:
    """The hunt stopped after so many more updates, again and again, and then to its end."""
    for left in stops:
        with pytest.raises(Stop):
            hunted(out, strategy, at=At([left], _raise), **options)
    return hunted(out, strategy, **options)


def _raise() -> None:
    raise Stop


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_stopped_on_both_ranks_it_ends_as_undisturbed(tmp_path: Path, strategy: str) -> None:
    """In level 0 after the rewind point, and in later levels before and after a checkpoint."""
    options: dict[str, Any] = {"optimizer": SGD, "levels": 1}
    whole, _ = on_ranks(functools.partial(hunted, **options), tmp_path / "whole", strategy)
    stops = [6, 14, 3]
    pieces, _ = on_ranks(functools.partial(_stopped, **options), tmp_path / "pieces", strategy, stops)
    assert pieces == whole
    for level in range(2):
        mine, theirs = weights(tmp_path / "whole", level), weights(tmp_path / "pieces", level)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_what_two_processes_began_one_can_end(tmp_path: Path) -> None:
    """Checkpoints hold whole tensors, of weights and of the optimizer."""
    whole = hunted(tmp_path / "whole", optimizer=ADAMW, levels=1)
    with pytest.raises(RuntimeError, match="Stop"):
        on_ranks(
            functools.partial(hunted, optimizer=ADAMW, levels=1, at=At([20], _raise)), tmp_path / "passed", "fsdp2"
        )
    assert (tmp_path / "passed" / "level_01" / "checkpoints" / "last.ckpt").is_file()
    alike(whole, hunted(tmp_path / "passed", optimizer=ADAMW, levels=1))


def test_when_one_rank_dies_the_other_fails_and_does_not_wait(tmp_path: Path) -> None:
    def train(out: Path) -> None:
        at = At([9], functools.partial(os._exit, 7)) if os.environ["RANK"] == "1" else None
        hunted(out, "ddp", at=at, levels=1)

    processes, results = start_ranks(train, tmp_path)
    try:
        rank, (succeeded, said) = results.get()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    assert (rank, succeeded) == (0, False)
    assert "RuntimeError" in said
    assert processes[1].exitcode == 7
    assert on_ranks(functools.partial(hunted, levels=1), tmp_path, "ddp"), "it goes on"


def test_what_divided_weights_cannot_be_asked_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="criterion 'snip' needs single batches"):
        on_ranks(functools.partial(hunted, pruner=Pruner("snip")), tmp_path, "fsdp2")
    assert not (tmp_path / "level_00").exists()


def test_processes_that_share_a_batch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what ModelParallelStrategy does unless told otherwise."""
    monkeypatch.setitem(STRATEGIES, "shared", ModelParallelStrategy)
    with pytest.raises(RuntimeError, match="give it data_parallel_size: 2 and tensor_parallel_size: 1"):
        on_ranks(hunted, tmp_path, "shared")
