"""Trainings in which Lightning's ModelPruning loses masks or first weights, with every way to prune while training.

``benchmarks/model_pruning.py`` shows side by side what it does there.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prune import DynamicSparsity, GradualPruning, KeepMasked, Masks, Pruner
from prune.callbacks.lottery import LotteryTicket
from prune.policies import Fixed
from prune.rewinding.snapshot import Snapshot
from prune.schedule import kept
from tests.helpers.ranks import on_ranks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
TOTAL = 6 * 10 + 10 * 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Linear(10, 3))


def batches() -> list[Any]:
    torch.manual_seed(0)
    return list(zip(torch.randn(8, 4, 6), torch.randint(3, (8, 4)), strict=True))


class Theirs(lp.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


WAYS: dict[str, Callable[[], Any]] = {
    "fixed": lambda: KeepMasked(Pruner()(net(), 0.5)),
    "gradual": lambda: GradualPruning(0.5, "0ep", "1ep", "2it"),
    "dynamic": lambda: DynamicSparsity(0.5, "0ep", "3ep", "3it"),
    "ticket": lambda: LotteryTicket(levels=1, rate=0.5, rewind="2it"),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def fit(module: Any, *callbacks: Any, epochs: int = 2, path: Any = None, **options: Any) -> Any:
    options = {**QUIET, "max_epochs": epochs, **options}
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    trainer = lp.Trainer(**options, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(data, 4), ckpt_path=path)
    return trainer


def alive(model: nn.Module) -> int:
    network: Any = getattr(model, "network", model)
    return sum(int(network[i].weight.count_nonzero()) for i in (0, 3))


class Each(lp.Callback):
    """What a function says of the module after every batch."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.found = function, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.found.append(self.function(pl_module))


@EVERY_WAY
def test_the_state_dict_is_that_of_a_dense_network(way: str, tmp_path: Path) -> None:
    module, look = Theirs(), Each(lambda m: list(m.state_dict()))
    fit(module, WAYS[way](), look).save_checkpoint(tmp_path / "last.ckpt")
    assert all(keys == list(Theirs().state_dict()) for keys in look.found)
    plain = Theirs()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert alive(plain) == kept(TOTAL, 0.5)


@EVERY_WAY
def test_a_copy_in_training_is_as_sparse_and_free(way: str) -> None:
    copies: list[Any] = []
    module = Theirs()
    fit(module, WAYS[way](), Each(lambda m: copies.append(copy.deepcopy(m))))
    last = copies[-1]
    assert alive(last) == kept(TOTAL, 0.5)
    x, y = batches()[0]
    assert torch.equal(last.network(x), module.network(x))
    optimizer = torch.optim.SGD(last.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(last.network(x), y).backward()
    optimizer.step()
    assert alive(last) > alive(module) == kept(TOTAL, 0.5), "masks are kept on the model that trains, not on its copy"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@EVERY_WAY
def test_resuming_keeps_the_density(way: str, tmp_path: Path) -> None:
    first, watch = WAYS[way](), Each(alive)
    fit(Theirs(), first).save_checkpoint(tmp_path / "last.ckpt")
    again, resumed = WAYS[way](), Theirs()
    fit(resumed, again, watch, epochs=4, path=tmp_path / "last.ckpt")
    assert watch.found
    assert set(watch.found) == {kept(TOTAL, 0.5)}
    if way != "dynamic":
        assert again.masks == first.masks


@EVERY_WAY
def test_a_second_fit_keeps_the_density(way: str) -> None:
    module, callback, watch = Theirs(), WAYS[way](), Each(alive)
    fit(module, callback)
    fit(module, callback, watch)
    assert set(watch.found) == {kept(TOTAL, 0.5)}


@pytest.mark.parametrize("way", ["fixed", "gradual", "dynamic"])
def test_an_average_of_the_weights_is_as_sparse(way: str) -> None:
    """For a ticket it would go over all levels, which is refused."""
    module = Theirs()
    fit(module, WAYS[way](), EMAWeightAveraging(decay=0.9))
    assert alive(module) == kept(TOTAL, 0.5)


def _rank(way: str) -> Any:
    module, callback = Theirs(), WAYS[way]()
    fit(module, callback, devices=2, strategy="ddp")
    return alive(module), callback.masks.hash(), [value.tolist() for value in module.parameters()]


def _ranks() -> Any:
    return {way: _rank(way) for way in WAYS}


def test_ranks_hold_the_same_sparse_network() -> None:
    one, other = on_ranks(_ranks)
    assert one == other
    assert {way: found[0] for way, found in one.items()} == dict.fromkeys(WAYS, kept(TOTAL, 0.5))


def test_three_resets_end_at_the_first_weights() -> None:
    """ModelPruning trains the very tensors that it keeps to go back to."""
    ticket, first = LotteryTicket(levels=3, rate=0.2, rewind="0it"), net()
    begun: list[bool] = []

    class Begun(lp.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not batch_idx:
                assert ticket.masks is not None
                expected = {n: v * ticket.masks[n] if n in ticket.masks else v for n, v in first.state_dict().items()}
                begun.append(all(torch.equal(v, expected[n]) for n, v in pl_module.network.state_dict().items()))

    fit(Theirs(), ticket, Begun(), epochs=1)
    assert begun == [True] * 4


def test_three_resets_in_a_bare_loop() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    point, first, masks = Snapshot.take(model, optimizer), copy.deepcopy(model.state_dict()), None
    for density in (0.8, 0.64, 0.512):
        for x, y in batches():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        masks = Pruner()(model, density, within=masks)
        policy = Fixed(masks)
        point.restore(model, optimizer)
        policy.follow(model, optimizer)
        assert isinstance(masks, Masks)
        assert alive(model) == kept(TOTAL, density)
        for name, value in model.state_dict().items():
            assert torch.equal(value, first[name] * masks[name] if name in masks else first[name])
        policy.detach()
