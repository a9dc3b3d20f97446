"""What goes back at the beginning of a level and what does not, for every mode, schedule and moment of being killed."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import lr_scheduler

from prune.rewinding.modes import MODES, Rewind, groups_of, hold, table
from tests.helpers.hunt_training import ADAMW, BATCHES, SGD, Blobs, Net, Stop, Watch, run_hunt, same, trainee, weights
from workbench.checkpoints import compact
from workbench.duration import Duration
from workbench.randomness import set_random_state

TOTAL = 3 * BATCHES
SCHEDULES: dict[str, Any] = {
    "cosine": ("step", functools.partial(lr_scheduler.CosineAnnealingLR, T_max=TOTAL)),
    "step": ("epoch", functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)),
    "one-cycle": ("step", functools.partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=TOTAL + 1)),
    "plateau": ("epoch", functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.9)),
}
RATES = [("weights", "cosine"), ("learning_rate", "step"), ("fine_tuning", "cosine"), ("fine_tuning", "one-cycle")]
RATES += [(mode, schedule) for mode in ("all", "fine_tuning") for schedule in ("plateau", "step")]


@pytest.mark.parametrize(("mode", "schedule"), RATES)
def test_learning_rates_are_what_the_mode_promises(tmp_path: Path, mode: Any, schedule: str) -> None:
    watch = Watch()
    optimizer = ADAMW if schedule == "one-cycle" else SGD
    of = trainee(tmp_path, optimizer=optimizer, scheduler=SCHEDULES[schedule], trainer={"callbacks": [watch]})
    run_hunt(tmp_path, of, (1.0, 0.6), mode=mode)
    rates, then = watch.rates
    assert len(rates) == TOTAL
    assert len(then) == TOTAL - 8
    assert len(set(rates)) > 1
    if mode == "fine_tuning":
        assert set(then) == {rates[-1]}
    elif schedule == "plateau":  # which follows the losses of its own level
        assert then[: 12 - 8] == rates[8:12]
    else:
        assert then == rates[8:]


STARTS = [*((mode, "8it") for mode in MODES), ("weights", "0it"), ("fine_tuning", "2ep"), ("learning_rate", "2ep")]


@pytest.mark.parametrize(("mode", "rewind"), STARTS)
def test_where_a_level_starts(tmp_path: Path, mode: Any, rewind: str) -> None:
    watch = Watch()
    of = trainee(tmp_path, rewind=rewind, trainer={"callbacks": [watch]})
    run_hunt(tmp_path, of, (1.0, 0.6), mode=mode)
    k = {"0it": 0, "8it": 8, "2ep": 12}[rewind]
    (_, dense, held) = watch.weights[0][k]
    step, start, momenta = watch.weights[1][0]
    assert step == (TOTAL if mode == "fine_tuning" else k)
    assert len(watch.weights[1]) == TOTAL - k
    masks = compact.masks(tmp_path / "level_01")
    for name, value in (dense if mode in ("all", "weights") else weights(tmp_path, 0)).items():
        assert torch.equal(start[name], value * masks[name] if name in masks else value), name
    assert momenta == {"weights": [0], "fine_tuning": [6]}.get(mode, held)
    if mode != "fine_tuning":  # which sees epochs that level 0 never came to
        assert all(torch.equal(one, other) for one, other in zip(watch.seen[1], watch.seen[0][k:]))


def test_a_fresh_order_is_another_one_and_the_same_every_time(tmp_path: Path) -> None:
    seen = []
    for name in ("a", "b"):
        watch = Watch()
        run_hunt(tmp_path / name, trainee(tmp_path / name, trainer={"callbacks": [watch]}), order="fresh")
        seen.append(watch.seen)
    assert all(not torch.equal(one, other) for one, other in zip(watch.seen[1], watch.seen[0][8:]))
    assert any(not torch.equal(one, other) for one, other in zip(watch.seen[1], watch.seen[2]))
    for one, other in zip(*seen):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_hunt_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path, mode: Any) -> None:
    options: dict[str, Any] = {"scheduler": SCHEDULES["one-cycle"], "checkpoint": "4it", "optimizer": ADAMW}
    whole = run_hunt(tmp_path / "whole", trainee(tmp_path / "whole", **options), (1.0, 0.5), mode=mode)
    for left in [9, 14, 7, -1]:
        of = trainee(tmp_path / "pieces", trainer={"callbacks": [Watch(left)]}, **options)
        try:
            pieces = run_hunt(tmp_path / "pieces", of, (1.0, 0.5), mode=mode)
        except Stop:
            continue
    for level in range(2):
        assert same(weights(tmp_path / "whole", level), weights(tmp_path / "pieces", level))
        for key in ("metrics", "history", "mask_hash", "best"):
            assert whole[level][key] == pieces[level][key]


@pytest.mark.parametrize("schedule", ["one-cycle", "plateau"])
def test_rate_zero_repeats_level_zero(tmp_path: Path, schedule: str) -> None:
    of = trainee(tmp_path, optimizer=ADAMW, scheduler=SCHEDULES[schedule])
    levels = run_hunt(tmp_path, of, (1.0, 1.0))
    assert levels[0]["history"] == levels[1]["history"]
    assert same(weights(tmp_path, 0), weights(tmp_path, 1))


def test_learning_rate_rewinding_is_a_continuation_by_hand(tmp_path: Path) -> None:
    """Trained weights, all else of the rewind point, and a loop without Lightning."""
    watch = Watch()
    of = trainee(tmp_path, scheduler=SCHEDULES["cosine"], trainer={"callbacks": [watch]})
    run_hunt(tmp_path, of, (1.0, 1.0), mode="learning_rate")
    point = torch.load(tmp_path / "checkpoints" / "rewind.ckpt", weights_only=False)
    model = Net()
    model.load_state_dict(weights(tmp_path, 0))
    optimizer = SGD(model.parameters())
    optimizer.load_state_dict(point["optimizer_states"][0])
    before = torch.get_rng_state()
    set_random_state(point["resume"]["random"][0])
    everything, labels = Blobs().held[0].tensors
    for inputs, rate in zip(watch.seen[1], watch.rates[0][8:], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        target = torch.stack([labels[(everything == row).all(1)][0] for row in inputs])
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    torch.set_rng_state(before)
    assert same(weights(tmp_path, 1), dict(model.state_dict()))


def test_held_groups_are_those_that_were_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.5}, {"params": [torch.nn.Parameter(torch.ones(1))]}], 0.1)
    kept = groups_of(optimizer)
    assert "params" not in kept[0]
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["momentum"] = 0.0, 0.9
    hold(optimizer, kept)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[1]["momentum"] == 0
    assert optimizer.param_groups[0]["params"] == [weight]
    with pytest.raises(ValueError, match="has 2 groups, 1 were kept"):
        hold(optimizer, kept[:1])


def test_the_documentation_has_the_table_of_modes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tickets.md").read_text(encoding="utf-8")
    assert table() in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "2 epochs"}, "duration '2 epochs'"),
        ({"mode": "nothing"}, r"rewind.mode is 'nothing': choose one of \['all', 'weights'"),
        ({"order": "other"}, r"rewind.order is 'other': choose one of \['same', 'fresh'\]"),
    ],
)
def test_what_is_no_rewinding_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewind(**arguments)


def test_a_bare_duration_is_where_to_rewind_to() -> None:
    assert Rewind.parse("2ep") == Rewind.parse(Duration(2, "ep")) == Rewind("2ep")
    assert Rewind.parse(Rewind("3it", "weights")).settings() == {"at": "3it", "mode": "weights", "order": "same"}
