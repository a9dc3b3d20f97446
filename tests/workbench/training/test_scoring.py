"""Scores do not depend on the precision of a training; weights and training are left as they were."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from workbench.training.loop import evaluate, train
from workbench.training.scoring import in_float32, scored_in_float32, widen


class Data(lp.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(16, 4, generator=draw)
        return DataLoader(TensorDataset(inputs, inputs[:, :1] * 1.003), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Net(lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.seen: list[torch.dtype] = []

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        output = self.layer(batch[0])
        self.seen.append(output.dtype)
        return (output - batch[1]).square().mean()

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        output = self.layer(batch[0])
        self.seen.append(output.dtype)
        self.log("val/loss", (output.float() - batch[1]).square().mean())

    def test_step(self, batch: list[torch.Tensor]) -> None:
        self.log("test/loss", (self.layer(batch[0]).float() - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("precision", "kind"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_a_network_scores_the_same_wherever_it_is_scored(tmp_path: Path, precision: Any, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    net = Net()
    trainer = {"max_epochs": 2, "accelerator": "cpu", "precision": precision}
    result = train(net, Data(), trainer=trainer, seed=0, out=tmp_path / "a")
    assert set(net.seen[:-2]) == {torch.bfloat16}, "training and its validation are in the trainer's precision"
    assert set(net.seen[-2:]) == {torch.float32}, "its scores are not"
    assert net.layer.weight.dtype == kind, "and the network is as it was"
    copied = Net()
    copied.load_state_dict(net.state_dict())
    assert evaluate(copied, Data(), tmp_path / "b") == pytest.approx(result["metrics"], abs=0)
    half = Net().to(torch.bfloat16)
    half.load_state_dict(net.state_dict())
    wide = Net()
    wide.load_state_dict(half.state_dict())
    assert evaluate(half, Data(), tmp_path / "c") == evaluate(wide, Data(), tmp_path / "d")


def test_weights_are_as_they_were_also_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2).half(), nn.BatchNorm1d(2).to(torch.bfloat16), nn.Linear(2, 2).double())
    net[0].weight.grad = torch.ones(2, 2, dtype=torch.float16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with in_float32(net):
        kinds = {value.dtype for value in net.state_dict().values()}
    assert kinds == {torch.float32, torch.float64, torch.int64}
    with pytest.raises(ZeroDivisionError), in_float32(net):
        raise ZeroDivisionError
    assert all(value.dtype == before[name].dtype for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[0].weight.grad.dtype == torch.float16
    assert len(widen(net)) == 6
    assert net[0].weight.dtype == torch.float32


def test_a_precision_that_cannot_be_changed_is_named() -> None:
    trainer = lp.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    said = "scores are computed in bf16-mixed, as SingleDeviceStrategy has it"
    with pytest.warns(UserWarning, match=said), scored_in_float32(trainer, nn.Linear(2, 2)):
        pass
    trainer.strategy.precision_plugin = plugin = MixedPrecision("bf16-mixed", "cpu")
    with scored_in_float32(trainer, nn.Linear(2, 2)):
        assert trainer.precision_plugin.precision == "32-true"
    assert trainer.precision_plugin is plugin
    with pytest.raises(ZeroDivisionError), scored_in_float32(trainer, nn.Linear(2, 2)):
        raise ZeroDivisionError
    assert trainer.precision_plugin is plugin
