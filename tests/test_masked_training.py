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
from torch import nn

import prune
from prune import LotteryTicket, Masks, Pruner
from prune.levels import Levels
from prune.policies import Fixed
from prune.rewinding.snapshot import Snapshot
from prune.schedule import kept
from tests.helpers.lightning_training import ADAMW, TOTAL, alive, data, fit, net, user_module
from tests.helpers.policy_cases import CASES
from tests.helpers.ranks import on_ranks

WAYS = {name: CASES[name] for name in ("fixed", "gradual", "rigl", "iterative")}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


class Each(lp.Callback):
    """The values of a function of the module, after every batch."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.values = function, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.values.append(self.function(pl_module))


@EVERY_WAY
def test_the_state_dict_is_that_of_a_dense_network(way: str, tmp_path: Path) -> None:
    module, look = user_module(optimizer=ADAMW), Each(lambda m: list(m.state_dict()))
    fit(module, WAYS[way].make(net(), prune), look, max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    assert all(keys == list(user_module(optimizer=ADAMW).state_dict()) for keys in look.values)
    plain = user_module(optimizer=ADAMW)
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert alive(plain) == kept(TOTAL, WAYS[way].density)


@EVERY_WAY
def test_a_copy_in_training_is_as_sparse_and_free(way: str) -> None:
    copies: list[Any] = []
    module = user_module(optimizer=ADAMW)
    fit(module, WAYS[way].make(net(), prune), Each(lambda m: copies.append(copy.deepcopy(m))), max_epochs=2)
    last = copies[-1]
    assert alive(last) == kept(TOTAL, WAYS[way].density)
    x, y = next(iter(data()))
    assert torch.equal(last.network(x), module.network(x))
    optimizer = torch.optim.SGD(last.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(last.network(x), y).backward()
    optimizer.step()
    assert alive(last) > alive(module) == kept(TOTAL, WAYS[way].density), (
        "masks are kept on the model that trains, not on its copy"
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@EVERY_WAY
def test_resuming_keeps_the_density(way: str, tmp_path: Path) -> None:
    first, watch = WAYS[way].make(net(), prune), Each(alive)
    fit(user_module(optimizer=ADAMW), first, max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    again, resumed = WAYS[way].make(net(), prune), user_module(optimizer=ADAMW)
    fit(resumed, again, watch, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert watch.values
    assert set(watch.values) == {kept(TOTAL, WAYS[way].density)}
    if way != "rigl":
        assert again.masks == first.masks


@EVERY_WAY
def test_a_second_fit_keeps_the_density(way: str) -> None:
    module, callback, watch = user_module(optimizer=ADAMW), WAYS[way].make(net(), prune), Each(alive)
    fit(module, callback, max_epochs=2)
    fit(module, callback, watch, max_epochs=2)
    assert set(watch.values) == {kept(TOTAL, WAYS[way].density)}


@pytest.mark.parametrize("way", ["fixed", "gradual", "rigl"])
def test_an_average_of_the_weights_is_as_sparse(way: str) -> None:
    """For a ticket it would go over all levels, which is refused."""
    module = user_module(optimizer=ADAMW)
    fit(module, WAYS[way].make(net(), prune), EMAWeightAveraging(decay=0.9), max_epochs=2)
    assert alive(module) == kept(TOTAL, WAYS[way].density)


def _rank(way: str) -> Any:
    module, callback = user_module(optimizer=ADAMW), WAYS[way].make(net(), prune)
    fit(module, callback, devices=2, strategy="ddp", max_epochs=4)  # of four batches a rank
    return alive(module), callback.masks.hash(), [value.tolist() for value in module.parameters()]


def _ranks() -> Any:
    return {way: _rank(way) for way in WAYS}


def test_ranks_hold_the_same_sparse_network() -> None:
    one, other = on_ranks(_ranks)
    assert one == other
    assert {way: count for way, (count, *_) in one.items()} == {
        way: kept(TOTAL, case.density) for way, case in WAYS.items()
    }


def test_three_resets_end_at_the_first_weights() -> None:
    """ModelPruning trains the very tensors that it keeps to go back to."""
    ticket, first = LotteryTicket(Levels(3, rate=0.2), rewind="0it"), net()
    begun: list[bool] = []

    class Begun(lp.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not batch_idx:
                assert ticket.masks is not None
                expected = {n: v * ticket.masks[n] if n in ticket.masks else v for n, v in first.state_dict().items()}
                begun.append(all(torch.equal(v, expected[n]) for n, v in pl_module.network.state_dict().items()))

    fit(user_module(optimizer=ADAMW), ticket, Begun(), max_epochs=1)
    assert begun == [True] * 4


def test_three_resets_in_a_bare_loop() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    point, first, masks = Snapshot.take(model, optimizer), copy.deepcopy(model.state_dict()), None
    for density in (0.8, 0.64, 0.512):
        for x, y in data():
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        masks = Pruner()(model, density, within=masks)
        policy = Fixed(masks)
        point.restore(model, optimizer)
        policy.follow(model, optimizer)
        assert isinstance(masks, Masks)
        assert sum(int(model.get_parameter(name).count_nonzero()) for name in masks) == kept(TOTAL, density)
        for name, value in model.state_dict().items():
            assert torch.equal(value, first[name] * masks[name] if name in masks else first[name])
        policy.detach()
