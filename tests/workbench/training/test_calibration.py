import pytest
import torch
from torch import nn

from distill import DistillModule
from tests.helpers.counting_module import Counting
from tests.helpers.ranks import on_ranks
from workbench import TaskModule
from workbench.tasks import Classification
from workbench.training.calibration import TrainingLoss, batch_runner

X, Y = torch.linspace(-1, 1, 48).reshape(8, 6), torch.arange(8) % 3


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))


def test_a_metric_counts_each_of_its_own_batches_once_however_often_the_loss_was_asked() -> None:
    module = Counting(net())
    loss = TrainingLoss(module)
    module.seen.update(2.0)
    for _ in range(3):
        loss(module.network, (X[:1], Y[:1]))
    module.seen.update(4.0)
    assert module.seen._update_count == 2
    assert module.seen.compute() == 3


def averaged() -> float:
    torch.distributed.init_process_group("gloo")
    module = Counting(net())
    TrainingLoss(module)(module.network, (X, Y))
    module.seen.update(float(torch.distributed.get_rank()))
    return float(module.seen.compute())


def test_metrics_are_still_put_together_over_ranks() -> None:
    assert on_ranks(averaged) == [0.5, 0.5]


def test_what_a_family_draws_does_not_depend_on_being_looked_at() -> None:
    def losses(looks: int) -> list[float]:
        module = DistillModule({"a": net(2), "b": net(3)}, net(1), Classification(3))
        torch.manual_seed(0)
        found = []
        for _ in range(3):
            found.append(module.step((X, Y)).loss.item())
            state = torch.get_rng_state()
            for _ in range(looks):
                TrainingLoss(module)(module.network, (X, Y))
            torch.set_rng_state(state)
        return found

    assert losses(2) == losses(0)
    assert len(set(losses(0))) == 3, "dropout draws"


def test_what_runs_is_what_the_network_takes() -> None:
    module = TaskModule(net(), Classification(3)).eval()
    assert torch.equal(batch_runner(module)(module.network, (X, Y)), module.network(X))
    family = TaskModule({"a": net(1), "b": net(2)}, Classification(3)).eval()
    assert {name: value.shape for name, value in batch_runner(family)(family.network, (X, Y)).items()} == {
        "a": (8, 3),
        "b": (8, 3),
    }
    theirs = Counting(net()).eval()
    assert batch_runner(theirs)(theirs.network, (X, Y)).item() == pytest.approx(
        nn.functional.cross_entropy(theirs.network(X), Y).item()
    )
