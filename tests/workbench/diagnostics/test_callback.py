from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.trainers import BOTH, QUIET
from workbench import TaskModule
from workbench.diagnostics import Diagnose, dead_units, gate_statistics, gradient_flow
from workbench.tasks import Classification

X, Y = torch.linspace(-1, 1, 96).reshape(16, 6).sin(), torch.arange(16) % 3
MASKS = {"0.weight": torch.eye(8, 6, dtype=torch.bool)}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def theirs(namespace: Any) -> Any:
    class Theirs(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = cross_entropy(self.network, batch)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Theirs()


def fit(namespace: Any, module: Any, *callbacks: Any, shuffle: bool = False, **options: Any) -> Any:
    torch.manual_seed(3)
    trainer = namespace.Trainer(**{"max_epochs": 2, **QUIET, **options}, callbacks=list(callbacks))
    loaders = [DataLoader(TensorDataset(X, Y), 4, shuffle)]
    if isinstance(module, TaskModule):
        loaders.append(DataLoader(TensorDataset(X, Y), 4))
    trainer.fit(module, *loaders)
    return trainer


class Masked(lp.Callback, pl.Callback):  # type: ignore[misc]
    """As one that keeps masks."""

    masks = MASKS


@BOTH
def test_training_is_the_same_bit_for_bit_and_the_numbers_are_logged(namespace: Any) -> None:
    alone, watched, callback = theirs(namespace), theirs(namespace), Diagnose()
    plain, trainer = fit(namespace, alone, shuffle=True), fit(namespace, watched, callback, Masked(), shuffle=True)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values()))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged.pop("train_loss") == float(plain.callback_metrics["train_loss"])
    network = watched.network
    gradients = callback.last["gradients"]
    assert gradients["layers"]["0.weight"] > 0
    assert logged == pytest.approx(
        {
            "dead": 0,
            "zero": 0,
            "gate/2": callback.last["gates"]["2"]["slope_squared"],
            "gradient_flow": gradients["total"],
            "gradient_ratio": gradients["ratio"],
        }
    )
    assert callback.last["units"] == {"2": {"dead": 0, "zero": 0, "units": 8}}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@BOTH
def test_what_it_finds_is_what_the_functions_find(namespace: Any) -> None:
    module, callback = theirs(namespace), Diagnose(batches=4, layers=True)
    module.network[3].p = 0.0
    trainer = fit(namespace, module, callback, Masked(), max_epochs=1)
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 16, 4)]
    assert callback.last["units"] == dead_units(module.network, batches)
    gates = gate_statistics(module.network, batches)["2"]
    found = callback.last["gates"]["2"]
    assert found.pop("kind") == gates.pop("kind") == "gelu"
    assert found == pytest.approx(gates)
    logged = trainer.callback_metrics
    assert {"dead/2", "gradient_flow/0.weight", "gradient_flow/4.bias"} <= logged.keys()
    gradients = gradient_flow(module.network, batches, cross_entropy, MASKS)
    assert callback.last["gradients"]["layers"] == pytest.approx(gradients["layers"], rel=1e-4, abs=1e-12)
    assert gradients["total"] < gradient_flow(module.network, batches, cross_entropy)["total"]


@pytest.mark.parametrize(
    ("every", "accumulate", "looks"),
    [("1ep", 1, [4, 8, 12]), ("2ep", 1, [8]), ("3it", 1, [3, 6, 9, 12]), ("3it", 2, [3, 6]), ("2it", 2, [2, 4, 6])],
)
def test_it_looks_when_it_is_time(every: str, accumulate: int, looks: list[int], monkeypatch: Any) -> None:
    seen = []

    def noted(self: Any, trainer: Any, pl_module: Any) -> None:
        seen.append(trainer.global_step)
        look(self, trainer, pl_module)

    look = Diagnose._look
    monkeypatch.setattr(Diagnose, "_look", noted)
    fit(lp, theirs(lp), Diagnose(every), max_epochs=3, accumulate_grad_batches=accumulate)
    assert seen == looks


def test_a_module_of_a_task_is_asked_for_what_its_network_takes() -> None:
    module, callback = TaskModule(net(), Classification(3)), Diagnose()
    fit(lp, module, callback, max_epochs=1)
    assert callback.last["units"]["2"]["units"] == 8


def test_mistakes_are_named_before_training() -> None:
    with pytest.raises(ValueError, match="every is 0ep: give at least 1ep or 1it"):
        Diagnose("0ep")
    with pytest.raises(ValueError, match="batches is 0"):
        Diagnose(batches=0)
    by_hand = theirs(lp)
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="Theirs steps its optimizers in training_step"):
        fit(lp, by_hand, Diagnose())
    loader = DataLoader(TensorDataset(X, Y), 4)
    with pytest.raises(ValueError, match="there are 2 training loaders"):
        lp.Trainer(max_epochs=1, **QUIET, callbacks=[Diagnose()]).fit(theirs(lp), {"a": loader, "b": loader})
