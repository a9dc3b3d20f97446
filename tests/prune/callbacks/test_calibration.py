from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from prune import GradualPruning, KeepMasked, LotteryTicket, Pruner
from prune.callbacks.calibration import calibration
from prune.criteria import CRITERIA
from prune.levels import Levels
from tests.helpers.counting_module import Counting
from workbench import TaskModule
from workbench.tasks import Classification

OPTIONS = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
QUIET: dict[str, Any] = dict.fromkeys(OPTIONS, False)
X, Y = torch.randn(24, 6), torch.arange(24) % 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(0.5), nn.Linear(10, 3))


def theirs(namespace: Any, returns: Any = lambda loss: loss) -> Any:
    class Theirs(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train/loss", loss)
            return returns(loss)

    return Theirs()


def fit(namespace: Any, module: Any, loader: Any, callback: Any) -> None:
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    namespace.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(module, loader)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("returns", [lambda loss: loss, lambda loss: {"loss": loss}], ids=["tensor", "mapping"])
@pytest.mark.parametrize("namespace", [lp, pl], ids=["lightning.pytorch", "pytorch_lightning"])
def test_masks_are_those_of_the_same_batches_and_loss_given_by_hand(namespace: Any, returns: Any) -> None:
    module, loader = theirs(namespace, returns), DataLoader(TensorDataset(X, Y), 4)
    pruner, network = Pruner("snip"), module.network
    torch.manual_seed(5)
    expected = pruner(network, 0.3, loader=[(X[i : i + 4], Y[i : i + 4]) for i in (0, 4)], loss=cross_entropy)
    before = torch.get_rng_state()
    torch.manual_seed(5)
    assert pruner(network, 0.3, **calibration(pruner.axes.criterion, module, lambda: loader, 2)) == expected
    torch.set_rng_state(before)
    assert "log" not in vars(module)


def test_a_module_of_a_task_is_asked_for_its_own_loss_and_inputs() -> None:
    module = TaskModule(net(), Classification(3))
    loader = DataLoader(TensorDataset(X, Y), 8)
    for name in ("taylor", "wanda", "synflow", "grasp"):
        pruner = Pruner(name, allocation="uniform")
        masks = pruner(module.network, 0.5, **calibration(pruner.axes.criterion, module, lambda: loader, 3))
        assert masks.density == pytest.approx(0.5, abs=0.02)


def test_nothing_is_asked_for_where_weights_tell_enough() -> None:
    def never() -> Any:
        raise AssertionError("asked")

    assert calibration(CRITERIA["magnitude"], theirs(lp), never, 0) == {}


class Stream(IterableDataset):
    """Remembers where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < len(X):
            self.at += 1
            yield X[self.at - 1], Y[self.at - 1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda workers: DataLoader(TensorDataset(X, Y), 4, shuffle=True, num_workers=workers),
        lambda workers: DataLoader(
            TensorDataset(X, Y), 4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3)
        ),
        lambda workers: DataLoader(TensorDataset(X, Y), None, num_workers=workers),
        lambda workers: DataLoader(Stream(), 4, num_workers=workers),
    ],
    ids=["batches", "own generator", "samples", "stream"],
)
def test_neither_random_numbers_nor_a_running_epoch_are_touched(make: Any, workers: int) -> None:
    torch.manual_seed(2)
    alone = [batch[1].tolist() for batch in make(workers)]
    torch.manual_seed(2)
    loader = make(workers)
    running = iter(loader)
    seen = [next(running)[1].tolist()]
    shown = calibration(CRITERIA["wanda"], theirs(lp), lambda: loader, 2)["loader"]
    state = torch.get_rng_state()
    once, again = list(shown), list(shown)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(once) == 2
    assert all(torch.equal(a, b) for x, y in zip(once, again) for a, b in zip(x, y)), "the same at every reading"
    assert seen + [batch[1].tolist() for batch in running] == alone


@pytest.mark.parametrize("namespace", [lp, pl], ids=["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "wanda"])
def test_a_callback_prunes_before_the_first_update(namespace: Any, criterion: str) -> None:
    """Masks are those of the initial weights, and the training that follows is the same as under given masks."""
    loader, pruner = DataLoader(TensorDataset(X, Y), 4), Pruner(criterion, allocation="uniform")
    sparse = GradualPruning(0.4, "0it", "1it", "1it", pruner, schedule="one_shot", batches=2)
    pruned, given = theirs(namespace), theirs(namespace)
    torch.manual_seed(7)
    fit(namespace, pruned, loader, sparse)
    assert sparse.masks is not None
    assert sparse.masks.density == pytest.approx(0.4, abs=0.02)
    if criterion in ("synflow", "wanda"):
        again = theirs(namespace)
        assert sparse.masks == pruner(
            again.network, 0.4, **calibration(pruner.axes.criterion, again, lambda: loader, 2)
        )
    torch.manual_seed(7)
    fit(namespace, given, loader, KeepMasked(sparse.masks))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), given.parameters()))


def test_a_ticket_by_a_criterion_of_the_loss() -> None:
    ticket = LotteryTicket(Levels(2, rate=0.5), rewind="0it", pruner=Pruner("taylor", allocation="uniform"), batches=2)
    fit(lp, theirs(lp), DataLoader(TensorDataset(X, Y), 4), ticket)
    assert [row["density"] for row in ticket.levels] == pytest.approx([1, 0.5, 0.25], abs=0.02)


def test_batches_are_those_that_training_sees() -> None:
    """Through the hooks of module or data module and the precision, and of a training_step without an index."""

    class Bytes(lp.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset((X * 9).to(torch.int8), Y), 4)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0].double() / 9, batch[1]

    class Short(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def training_step(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    for criterion in ("taylor", "grasp", "wanda", "synflow"):
        pruner = Pruner(criterion, allocation="uniform")
        sparse = GradualPruning(0.4, "0it", "1it", "1it", pruner, schedule="one_shot", batches=2)
        trainer = lp.Trainer(max_epochs=1, accelerator="cpu", callbacks=[sparse], precision="64-true", **QUIET)
        trainer.fit(Short(), datamodule=Bytes())
        assert sparse.masks is not None, criterion


def test_metrics_of_a_module_do_not_count_what_is_looked_at() -> None:
    module = Counting(net())
    module.seen(torch.tensor(5.0))
    pruner = Pruner("grasp", allocation="uniform")
    loader = DataLoader(TensorDataset(X, Y), 4)
    pruner(module.network, 0.5, **calibration(pruner.axes.criterion, module, lambda: loader, 3))
    assert module.seen.compute() == 5
    module.seen(torch.tensor(7.0))
    assert module.seen.compute() == 6


def test_a_criterion_that_reads_one_batch_draws_one() -> None:
    drawn = []

    class Watched(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            drawn.append(index)
            return super().__getitem__(index)

    pruner = Pruner("synflow", allocation="uniform")
    loader = DataLoader(Watched(X, Y), 4)
    pruner(net(), 0.5, **calibration(pruner.axes.criterion, theirs(lp), lambda: loader, 5))
    assert len(drawn) == 4 * 100, "rounds"


def test_mistakes_are_named() -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)
    family = TaskModule({"a": net(), "b": net()}, Classification(3))
    with pytest.raises(ValueError, match="'wanda' runs one network, and this is a family of 2"):
        calibration(CRITERIA["wanda"], family, lambda: loader, 1)
    with pytest.raises(ValueError, match="there are 2 training loaders"):
        calibration(CRITERIA["snip"], theirs(lp), lambda: {"a": loader, "b": loader}, 1)
    by_hand = theirs(lp)
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="steps its optimizers in training_step"):
        calibration(CRITERIA["snip"], by_hand, lambda: loader, 1)
    mapped = [{"x": X[:4], "y": Y[:4]}]
    with pytest.raises(ValueError, match=r"Sequential cannot be called with arguments \['x', 'y'\] of a batch"):
        Pruner("wanda")(net(), 0.5, **calibration(CRITERIA["wanda"], theirs(lp), lambda: mapped, 1))
    with pytest.raises(ValueError, match="batches is 0: criterion 'snip' looks at 1 or more"):
        calibration(CRITERIA["snip"], theirs(lp), lambda: loader, 0)
    silent = theirs(lp, lambda loss: None)
    with pytest.raises(ValueError, match="training_step gives NoneType, not a loss"):
        Pruner("snip")(silent.network, 0.5, **calibration(CRITERIA["snip"], silent, lambda: loader, 1))
    shown = calibration(CRITERIA["snip"], theirs(lp), lambda: loader, 1)
    with pytest.raises(ValueError, match="computes the loss of its own network only"):
        Pruner("snip")(net(), 0.5, **shown)
