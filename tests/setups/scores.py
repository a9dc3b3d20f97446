"""Set-ups about what criteria look at, how groups are scored, how a density is divided, and barriers."""

import tempfile
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune import Controls, Masks, Pruner, Rewind, hunt
from prune.criteria import CRITERIA
from prune.tickets.controls import Interpolation
from tests.setups.base import Setup
from workbench import load, records
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import run
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


class Bottleneck(nn.Module):
    """Its middle layer starts with weights far smaller than the others'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.init_args: dict = {}
        self.into, self.middle, self.out = nn.Linear(64, 20), nn.Linear(20, 20), nn.Linear(20, 10)
        with torch.no_grad():
            self.middle.weight.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.middle(self.into(x).relu()).relu())


RECIPE = """
data: workbench.data.Digits
trainer: {max_steps: 2, accelerator: cpu}
ticket:
  job: hunt
  model: tests.setups.scores.Bottleneck
  density: [0.05]
  rewind: 1it
  pruner: {allocation: ALLOCATION}
  controls: {diagnose: false}
"""


def _floor() -> None:
    """Plain global magnitude pruning, as in the papers, from a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        kept = {}
        for name, allocation in (("global", "global"), ("plain", "{floor: 0}")):
            path = Path(folder, f"{name}.yaml")
            path.write_text(RECIPE.replace("ALLOCATION", allocation))
            with pytest.warns(UserWarning, match="layer collapse: 'middle.weight'"):
                run(recipes.read(path), Path(folder, name))
            record = records.read(Path(folder, name, "ticket"))
            assert record is not None
            assert record["pruner"]["allocation"] == {
                "class": "prune.allocation.Global",
                "floor": 0 if name == "plain" else 0.1,
            }
            trained = load(Path(folder, name, "ticket/level_00")).state_dict()
            weights = {key: trained[key].abs() for key in ("into.weight", "middle.weight", "out.weight")}
            threshold = torch.cat([each.flatten() for each in weights.values()]).topk(94).values[-1]
            masks = Masks(compact.masks(Path(folder, name, "ticket/level_01")))
            kept[name] = {key: int(mask.sum()) for key, mask in masks.items()}
            if name == "plain":
                assert all(torch.equal(masks[key], weights[key] >= threshold) for key in weights)
        assert kept["plain"]["middle.weight"] == 0
        assert kept["global"]["middle.weight"] == 2, "a tenth of 20, its part at the same density"


class DigitsModel(nn.Module):
    """As transformers' models: the loss is in the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
        logits = self.layers(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def _sorted_data() -> None:
    """SNIP at 5 % on 128 digits of a training set that is sorted by label."""
    from transformers import Trainer, TrainingArguments

    from prune.hf import GradualPruning

    digits = Digits()
    digits.setup("fit")
    x, y = (torch.cat(parts) for parts in zip(*digits.train_dataloader()))
    order = y.argsort(stable=True)
    rows = [{"pixels": x[i], "labels": y[i]} for i in order.tolist()]
    model = DigitsModel()
    snip = GradualPruning(0.05, "0it", "1it", "1it", Pruner("snip"), schedule="one_shot", batches=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=64,
            num_train_epochs=6,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            seed=0,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[snip]).train()
    assert snip.masks is not None
    assert abs(snip.masks.density - 0.05) < 1e-4
    digits.setup("test")
    x, y = (torch.cat(parts) for parts in zip(*digits.test_dataloader()))
    assert (model(x)["logits"].argmax(1) == y).float().mean() > 0.8, ".64 where it sees the first rows, of one class"


def _gates(criterion: str) -> None:
    """Channels of a convolutional network, scored on two batches by a gate on each channel's output.

    The gate of a channel without a bias multiplies its filter, so its gradient is the sum of gradient times weight.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(2)]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    slopes = []
    for x, y in batches:
        gates = torch.ones(8, requires_grad=True)
        hook = model[0].register_forward_hook(lambda _, __, output, gates=gates: output * gates[:, None, None])
        (slope,) = torch.autograd.grad(loss(model, (x, y)), gates)
        hook.remove()
        slopes.append(slope)
    slope = torch.stack(slopes)
    expected = {"taylor": slope.square().mean(0), "snip": slope.mean(0).abs()}[criterion]
    masks = Pruner(criterion, "channel", exclude=nn.Linear)(model, 0.5, loader=batches, loss=loss)
    kept = masks["0.weight"].flatten(1).all(1)
    assert set(kept.nonzero().flatten().tolist()) == set(expected.topk(4).indices.tolist())

    scores = CRITERIA[criterion].score(model, {"0.weight": model[0].weight}, batches, loss)["0.weight"]
    means = Pruner(criterion, "channel", exclude=nn.Linear, group="mean")(model, 0.5, loader=batches, loss=loss)
    kept_by_means = means["0.weight"].flatten(1).all(1)
    assert set(kept_by_means.nonzero().flatten().tolist()) == set(scores.flatten(1).mean(1).topk(4).indices.tolist())
    assert not torch.equal(kept, kept_by_means), "another choice, which stays there by name"


SETUPS = [
    Setup("scores of groups", "Taylor", lambda: _gates("taylor")),
    Setup("scores of groups", "SNIP", lambda: _gates("snip")),
    Setup("data of a criterion", "a trainer's data sorted by label", _sorted_data),
    Setup("floor of the global allocation", "turned off by an argument", _floor),
    Setup("barriers", "points and split of a hunt", _barriers),
]
