"""Set-ups about what criteria look at, how groups are scored, how a density is divided, and barriers."""

import tempfile
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from prune import Controls, Rewind, hunt
from prune.tickets.controls import Interpolation
from tests.setups.base import Setup
from workbench.models import MLP
from workbench.tasks import Classification


class Rings(lightning.LightningDataModule):
    """Two classes by distance from the middle; sorted by label, as it was collected."""

    def __init__(self) -> None:
        super().__init__()
        points = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
        labels = (points.norm(dim=1) > 1.2).long()
        order = labels.argsort()
        self.points, self.labels = points[order], labels[order]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.points[::2], self.labels[::2]), batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.points[1::4], self.labels[1::4]), batch_size=16)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.points[3::4], self.labels[3::4]), batch_size=16)


def _barriers() -> None:
    """Stability to the order of the data, as in the paper: 30 points, the error on training and test data."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = hunt(
            model=MLP(2, [8], 2, activation="tanh"),
            data=Rings(),
            task=Classification(2),
            levels=0,
            rewind=Rewind("1it"),
            trainer={"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
            controls=Controls(connectivity=Interpolation(points=30, split=("train", "test"))),
            out=Path(folder),
        )
    barriers = result["levels"][0]["connectivity"]["orders"]
    assert list(barriers) == ["train", "test"]
    for split, barrier in barriers.items():
        assert barrier["metric"] == f"{split}/accuracy"
        assert len(barrier["heights"]) == 30
        assert barrier["barrier"] == max(barrier["heights"]) - sum(barrier["ends"]) / 2


SETUPS = [Setup("barriers", "points and split of a hunt", _barriers)]
