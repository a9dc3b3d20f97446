import functools
import os
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import QUIET
from workbench.models import MLP
from workbench.tasks import Classification
from workbench.training.means import GlobalMean, Means
from workbench.training.module import TaskModule

OPTIONS: dict[str, Any] = {**QUIET, "use_distributed_sampler": False, "limit_val_batches": 0}


def rows() -> tuple[Tensor, Tensor]:
    """Sixteen rows, of which 3, 1, 4 and 2 count in each four."""
    torch.manual_seed(7)
    labels = torch.tensor([0, 1, 2, -1, -1, -1, 1, -1, 2, 2, 0, 1, -1, 0, -1, 2])
    return torch.randn(16, 6), labels


def batches(order: list[int], size: int) -> DataLoader:
    x, y = rows()
    return DataLoader(TensorDataset(x[order], y[order]), size)


def trained(loader: DataLoader, **options: Any) -> list[list[float]]:
    """Weights after one epoch of SGD, which shows the gradient."""
    torch.manual_seed(1)
    network = MLP(6, [5], 3)
    module = TaskModule(network, Classification(3, ignore_index=-1), functools.partial(torch.optim.SGD, lr=1.0))
    trainer = lp.Trainer(**{**OPTIONS, "max_epochs": 1, **options})
    trainer.fit(module, loader, loader)
    return [parameter.flatten().tolist() for parameter in network.parameters()]


def ranked(pieces: int, **options: Any) -> list[list[float]]:
    rank = int(os.environ["RANK"])
    # Ranks take turns, so that one has 3 + 4 valid rows and the other 1 + 2.
    mine = [i for i in range(16) if (i // 4) % 2 == rank]
    return trained(batches(mine, 8 // pieces), devices=2, strategy="ddp", accumulate_grad_batches=pieces, **options)


def largest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_same_rows_in_pieces_give_the_same_gradient(clip: float | None) -> None:
    """Pitfall 7: the mean is over all valid positions, not over means of micro-batches."""
    options: dict[str, Any] = {"gradient_clip_val": clip}
    whole = trained(batches(list(range(16)), 16), **options)
    for pieces in (2, 4):
        found = trained(batches(list(range(16)), 16 // pieces), accumulate_grad_batches=pieces, **options)
        assert largest(found, whole) < 1e-6
    untouched = trained(batches(list(range(16)), 16), limit_train_batches=0)
    assert largest(whole, untouched) > 1e-3


def test_a_mean_of_means_would_be_another() -> None:
    """The check above can fail."""
    x, y = rows()
    torch.manual_seed(1)
    network = MLP(6, [5], 3)
    parts = [nn.functional.cross_entropy(network(x[i : i + 4]), y[i : i + 4], ignore_index=-1) for i in (0, 4, 8, 12)]
    whole = nn.functional.cross_entropy(network(x), y, ignore_index=-1)
    assert abs(sum(parts).item() / 4 - whole.item()) > 1e-2


@pytest.mark.parametrize("pieces", [1, 2])
def test_ranks_with_other_numbers_of_rows_that_count(pieces: int) -> None:
    whole = trained(batches(list(range(16)), 16))
    one, other = on_ranks(ranked, pieces)
    assert one == other
    assert largest(one, whole) < 1e-6


def test_an_update_of_fewer_pieces_counts_what_it_has() -> None:
    """The last update of an epoch, where Lightning divides by the number of pieces that a whole one has."""
    short = trained(batches(list(range(12)), 4), accumulate_grad_batches=3)
    for planned in (4, 8):
        assert largest(trained(batches(list(range(12)), 4), accumulate_grad_batches=planned), short) < 1e-6


def test_an_update_that_was_broken_off_leaves_nothing_behind() -> None:
    """Its micro-batches do not count in the next one."""

    class Enough(lp.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power failure")

    torch.manual_seed(1)
    module = TaskModule(MLP(6, [5], 3), Classification(3, ignore_index=-1), functools.partial(torch.optim.SGD, lr=1.0))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = batches(list(range(16)), 4)
    options = {**OPTIONS, "max_epochs": 1, "accumulate_grad_batches": 4}
    with pytest.raises(RuntimeError, match="power failure"):
        lp.Trainer(**options, callbacks=[Enough()]).fit(module, loader, loader)
    module.load_state_dict(before)
    module.zero_grad()
    lp.Trainer(**options).fit(module, loader, loader)
    whole = trained(batches(list(range(16)), 16))
    assert largest([p.flatten().tolist() for p in module.network.parameters()], whole) < 1e-6


def test_a_first_piece_with_hardly_any_does_not_blow_up_the_others() -> None:
    """In half precision a loss of thousands of positions, weighed against one, overflows."""
    mean, loss = GlobalMean(), torch.ones(())
    trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=2)
    weight = nn.Parameter(torch.zeros(2))
    for first, second in ((4096, 1), (0, 4096), (1, 4096), (0, 0)):
        factors = [float(mean.scale_loss(loss, torch.tensor(count), trainer)) for count in (first, second)]
        assert max(factors) <= 1
        weight.grad = torch.ones(2) * sum(factors) / 2
        mean.scale_gradients([weight], trainer)
        assert weight.grad.tolist() == pytest.approx([1.0 if first + second else 0.0] * 2, rel=1e-5)


def test_pieces_in_which_nothing_counts() -> None:
    x, _ = rows()
    nothing = DataLoader(TensorDataset(x, torch.full((16,), -1)), 4)
    before = trained(batches(list(range(16)), 16), limit_train_batches=0)
    assert largest(trained(nothing, accumulate_grad_batches=4), before) == 0


def test_in_half_precision_too() -> None:
    whole = trained(batches(list(range(16)), 16), precision="bf16-mixed")
    pieces = trained(batches(list(range(16)), 4), precision="bf16-mixed", accumulate_grad_batches=4)
    assert largest(pieces, whole) < 0.02


def test_means_weigh_and_remember() -> None:
    means = Means()
    assert not means
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, torch.tensor(3))
    means.add({"a": torch.tensor(5.0)}, torch.tensor(1))
    assert means.local() == {"a": [8.0, 4.0], "b": [1.5, 3.0]}
    other = Means()
    other.restore(means.state(), 0, 1)
    assert other.local() == means.local()
    for rank in range(3):
        part = Means()
        part.restore([{"a": [1.0, 1.0]}, {"a": [2.0, 3.0]}], rank, 3)
        assert part.local() == ({"a": [3.0, 4.0]} if rank == 0 else {}), "another world: rank 0 has it all"
        part.restore([{"a": [1.0, 1.0]}, {"a": [2.0, 3.0]}, {}], rank, 3)
        assert part.local() == [{"a": [1.0, 1.0]}, {"a": [2.0, 3.0]}, {}][rank]


def test_a_mean_over_no_position_is_left_out() -> None:
    means = Means()
    means.add({"hard": torch.tensor(float("nan"))}, torch.tensor(0))
    assert means.local() == {"hard": [0.0, 0.0]}
    means.add({"hard": torch.tensor(2.0)}, torch.tensor(3))
    assert means.local() == {"hard": [6.0, 3.0]}


def test_means_take_no_graph_and_keep_their_precision() -> None:
    means = Means()
    loss = torch.tensor(0.1, requires_grad=True)
    for _ in range(1000):
        means.add({"loss": loss}, torch.tensor(10**6))
    total, weight = means.local()["loss"]
    assert total / weight == pytest.approx(loss.item(), rel=1e-12)


def test_means_are_what_every_rank_has() -> None:
    def gathered() -> Any:
        torch.distributed.init_process_group("gloo")
        means = Means()
        means.add({"a": torch.tensor(float(torch.distributed.get_rank()))}, torch.tensor(2))
        return means.state()

    assert on_ranks(gathered) == [[{"a": [0.0, 2.0]}, {"a": [2.0, 2.0]}]] * 2
