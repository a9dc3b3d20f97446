import contextlib
import copy
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from prune import EarlyBird, Pruner
from prune.connectivity import error_barrier, interpolate
from prune.masks import Masks
from tests.helpers.ranks import on_ranks
from tests.prune.connectivity.test_states import assert_same, everything
from workbench import TaskModule
from workbench.diagnostics import Diagnose
from workbench.tasks import Classification
from workbench.training.loop import training_loader


def net(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(8) if norm else nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(), nn.Linear(8, 3))


class Data(lp.LightningDataModule):
    """Counts how often it is set up."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        torch.manual_seed(0)
        self.x, self.y = torch.randn(60, 6), torch.arange(60) % 3

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def loader(self, part: slice, shuffle: bool = False) -> Any:
        return DataLoader(TensorDataset(self.x[part], self.y[part]), 8, shuffle=shuffle)

    def train_dataloader(self) -> Any:
        return self.loader(slice(32), shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(slice(32, 48))

    def test_dataloader(self) -> Any:
        return self.loader(slice(48, 60))


class Theirs(lp.LightningModule):
    """Without a ``network``; logs as in the tutorials."""

    def __init__(self, names: tuple[str, ...] = ("val_loss", "val_acc")) -> None:
        super().__init__()
        self.layers, self.names = net(1), names

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self(batch[0]) + torch.rand(1)
        numbers = (nn.functional.cross_entropy(output, batch[1]), (output.argmax(1) == batch[1]).float().mean())
        self.log_dict(dict(zip(self.names, numbers)))


def errors(model: nn.Module, a: Any, b: Any, x: Tensor, y: Tensor, refresh: Any = None, points: int = 5) -> list[float]:
    """By hand, in copies of the network."""
    found = []
    for step in range(points):
        at = copy.deepcopy(model)
        at.load_state_dict(interpolate(a, b, step / (points - 1)))
        if refresh is not None:
            update_bn(refresh, at)
        found.append((at.eval()(x).argmax(1) != y).float().mean().item())
    return found


@pytest.mark.parametrize(("split", "part"), [("train", slice(32)), ("val", slice(32, 48)), ("test", slice(48, 60))])
def test_heights_are_errors_on_the_split(split: Any, part: slice) -> None:
    data, module, other = Data(), TaskModule(net(1), Classification(3)), net(2)
    found = error_barrier(module, data, module.network.state_dict(), other.state_dict(), 5, split)
    expected = errors(other, net(1).state_dict(), other.state_dict(), data.x[part], data.y[part])
    assert found["heights"] == pytest.approx(expected, abs=1e-6)
    assert found["ends"] == [found["heights"][-1], found["heights"][0]]
    assert found["barrier"] == pytest.approx(max(expected) - (expected[0] + expected[-1]) / 2, abs=1e-6)
    assert (found["metric"], found["split"], found["recalibrated"]) == (f"{split}/accuracy", split, False)
    assert found["stable"] == (found["barrier"] < 0.02)
    stage = {"train": "fit", "val": "validate", "test": "test"}[split]
    assert data.calls == ["prepare", stage], "set up once"


def test_statistics_of_batch_norms_are_estimated_on_training_batches() -> None:
    data, module, other = Data(), TaskModule(net(1, norm=True), Classification(3)), net(2, norm=True)
    a, b = copy.deepcopy(module.network.state_dict()), other.state_dict()
    shown = [batch for batch, _ in zip(training_loader(module, data, 3), range(2))]
    x, y = data.x[32:48], data.y[32:48]
    for refresh, batches in ((2, shown), (shown[:1], shown[:1]), (None, None)):
        found = error_barrier(module, data, a, b, 5, recalibrate=refresh, seed=3)
        assert found["heights"] == pytest.approx(errors(other, a, b, x, y, batches), abs=1e-6), refresh
        assert found["recalibrated"] == (refresh is not None)


@pytest.mark.parametrize(
    ("names", "metric", "named", "error"),
    [
        (("val_loss", "val_acc"), None, "val_acc", True),
        (("val/loss", "val/accuracy"), None, "val/accuracy", True),
        (("val_loss", "other"), None, "val_loss", False),
        (("other", "score"), ("score", "max"), "score", True),
        (("other", "score"), ("other", "min"), "other", False),
    ],
)
def test_a_module_of_ones_own_is_judged_by_what_it_logs(names: Any, metric: Any, named: str, error: bool) -> None:
    data, module, other = Data(), Theirs(names), Theirs()
    with torch.no_grad():
        other.layers[3].bias.add_(torch.tensor([5.0, 0.0, 0.0]))
    found = error_barrier(module, data, module.state_dict(), other.state_dict(), 3, metric=metric)
    assert found["metric"] == named
    assert (found["stable"] is None) == (not error)
    x, y, same = data.x[32:48], data.y[32:48], Theirs()
    if error:
        expected = errors(same, same.state_dict(), other.state_dict(), x, y, points=3)
    else:
        states = [interpolate(same.state_dict(), other.state_dict(), alpha) for alpha in (0, 0.5, 1)]
        expected = [nn.functional.cross_entropy(_load(Theirs(), s).eval()(x), y).item() for s in states]
    assert found["heights"] == pytest.approx(expected, abs=1e-5)


def _load(module: nn.Module, state: Any) -> nn.Module:
    module.load_state_dict(state)
    return module


def test_every_training_sample_counts_once() -> None:
    """Also where training shuffles and drops the last batch, and the module names its metrics itself."""
    data, module, other = Data(), Theirs(), Theirs()
    data.loader = lambda part, shuffle=False: DataLoader(  # type: ignore[method-assign]
        TensorDataset(data.x[part], data.y[part]), 12, shuffle=shuffle, drop_last=shuffle
    )
    with torch.no_grad():
        other.layers[3].bias.add_(torch.tensor([5.0, 0.0, 0.0]))
    found = error_barrier(module, data, module.state_dict(), other.state_dict(), 3, "train")
    expected = errors(Theirs(), Theirs().state_dict(), other.state_dict(), data.x[:32], data.y[:32], points=3)
    assert found["heights"] == pytest.approx(expected, abs=1e-6)
    assert (found["metric"], found["split"]) == ("train_acc", "train")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was_also_after_an_exception(fails: bool) -> None:
    data, module = Data(), Theirs()
    trainer = lp.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    module.layers[1].eval()
    before, own = everything(module), dict(vars(data))
    seen = 0

    def validation_step(batch: Any, batch_idx: int) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyError("no")

    if fails:
        module.validation_step = validation_step  # type: ignore[method-assign]
    other = {name: value + 1 for name, value in module.state_dict().items()}
    with contextlib.suppress(KeyError):
        error_barrier(module, data, module.state_dict(), other, 3)
    assert (seen > 1) == fails
    assert_same(before, everything(module))
    assert module.trainer is trainer
    assert {name: value for name, value in vars(data).items() if name != "trainer"} == {
        name: value for name, value in own.items() if name != "trainer"
    }


def test_the_same_every_time_although_validation_draws() -> None:
    data, module = Data(), Theirs()
    other = {name: value * 0.5 for name, value in module.state_dict().items()}
    first = error_barrier(module, data, module.state_dict(), other, 3)
    torch.rand(3)
    assert error_barrier(module, data, module.state_dict(), other, 3) == first
    assert error_barrier(module, data, other, module.state_dict(), 3)["heights"] == first["heights"][::-1]


def test_masked_weights_stay_masked_on_the_way() -> None:
    data, module = Data(), TaskModule(net(1), Classification(3))
    masks = Masks({"0.weight": torch.rand(8, 6) < 0.3})
    other = net(2)
    masks.apply(module.network)
    masks.apply(other)
    seen = []
    module.network.register_forward_hook(lambda *_: seen.append(masks.is_applied_to(module.network)))
    error_barrier(module, data, module.network.state_dict(), other.state_dict(), 3)
    assert seen == [True] * 6


def in_parallel() -> Any:
    module, other = TaskModule(net(1, norm=True), Classification(3)), net(2, norm=True).state_dict()
    diagnose, bird = Diagnose(), EarlyBird(Pruner("snip"), 0.3)
    parallel = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    lp.Trainer(**parallel, **quiet, max_epochs=3, callbacks=[diagnose, bird]).fit(module, datamodule=Data())
    found = error_barrier(module, Data(), module.network.state_dict(), other, 3, trainer=parallel)
    return found, diagnose.last, bird.distances, [value.tolist() for value in module.state_dict().values()]


def test_ranks_agree_on_all_that_is_said_of_a_training() -> None:
    first, second = on_ranks(in_parallel)
    assert first == second
    assert len(first[2]) == 2
    assert first[0]["recalibrated"]


def test_mistakes_are_named() -> None:
    data, module = Data(), TaskModule(net(1, norm=True), Classification(3))
    state = module.network.state_dict()
    with pytest.raises(ValueError, match="split is 'dev': one of"):
        error_barrier(module, data, state, state, split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recalibrate is 0: give 1 or more batches"):
        error_barrier(module, data, state, state, recalibrate=0)
    with pytest.raises(ValueError, match=r"Theirs has no test_step"):
        error_barrier(Theirs(), data, state, state, split="test")
    with pytest.raises(ValueError, match="LightningDataModule has no val_dataloader"):
        error_barrier(module, lp.LightningDataModule(), state, state)
    theirs = Theirs(("a", "b"))
    with pytest.raises(
        ValueError, match=r"logged 'a', 'b' on the val split, not val/accuracy or val_accuracy.*metric="
    ):
        error_barrier(theirs, data, theirs.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="the state does not fit Sequential"):
        error_barrier(module, data, {"x": torch.ones(1)}, {"x": torch.ones(1)})

    class Foreign(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match=r"Foreign is a pytorch_lightning\.LightningModule"):
        error_barrier(Foreign(), data, {}, {})  # type: ignore[arg-type]
