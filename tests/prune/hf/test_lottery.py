from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, get_scheduler

from prune import Pruner
from prune.hf import LotteryTicket
from prune.hf.lottery import level_length, schedule_levels
from prune.levels import Levels
from prune.rewinding.modes import MODES, Rewind
from prune.schedule import kept
from tests.helpers.ranks import on_ranks
from tests.helpers.transformers_training import (
    ADAMW,
    SGD,
    TOTAL,
    Watch,
    alive,
    arguments,
    bert,
    masks,
    same,
    sentences,
    trained,
    weights,
)

UNIFORM = Pruner(allocation="uniform")
LINEAR = {"lr_scheduler_type": "linear", "warmup_steps": 2, "train_sampling_strategy": "sequential"}


class States(TrainerCallback):
    """Weights and learning rate before the first update and after every one."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(weights(kwargs["model"]))
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(weights(kwargs["model"]))


def by_hand(levels: int, rate: float, length: int, point: int) -> tuple[dict[str, Tensor], list[float]]:
    """Linear-mode-connectivity paper, algorithm 2, with layers of one density; the data goes on from level to level."""
    torch.manual_seed(1)
    model, rows, step, rates = bert().train(), sentences(), 0, []
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    other = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.01}, {"params": other}], 0.05, momentum=0.9)
    alive_now = {name: torch.ones_like(mask) for name, mask in masks().items()}
    saved: Any = None
    for level in range(levels + 1):
        if level:
            for name, mask in alive_now.items():
                size, flat = mask.numel(), (model.get_parameter(name).detach().abs() * mask).flatten().tolist()
                order = sorted(range(size), key=lambda i: (-flat[i], i))
                alive_now[name] = torch.zeros(size).index_fill(
                    0, torch.tensor(order[: kept(size, (1 - rate) ** level)]), 1
                )
                alive_now[name] = alive_now[name].view(mask.shape).bool()
            parameters, momenta = saved
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(parameters[name] * alive_now.get(name, 1))
                    optimizer.state[value]["momentum_buffer"] = momenta[name] * alive_now.get(name, 1)
        for local in range(point if level else 0, length):
            if local == point and not level:
                momenta = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
                saved = weights(model), momenta
            rates.append(0.05 * (local / 2 if local < 2 else (length - local) / (length - 2)))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            batch = [rows[(4 * step + i) % 32] for i in range(4)]
            model(**{key: torch.stack([row[key] for row in batch]) for key in rows[0]}).loss.backward()
            for name, mask in alive_now.items():
                model.get_parameter(name).grad *= mask
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            with torch.no_grad():
                for name, mask in alive_now.items():
                    model.get_parameter(name).mul_(mask)
    return weights(model), rates


def test_it_is_iterative_pruning_with_rewinding_as_written_by_hand(tmp_path: Path) -> None:
    """Three levels of eight updates, of which five after the rewind point."""
    ticket, states = LotteryTicket(Levels(2, rate=0.5), rewind="3it", pruner=UNIFORM), States()
    trainer = trained(tmp_path, ticket, states, max_steps=18, **{**SGD, **LINEAR})
    expected, rates = by_hand(2, 0.5, 8, 3)
    assert states.rates == pytest.approx(rates)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    assert [(row["level"], row["steps"]) for row in ticket.levels] == [(0, 8), (1, 8), (2, 8)]
    assert ticket.masks is not None
    assert ticket.levels[-1]["mask_hash"] == ticket.masks.hash()
    assert ticket.masks.is_applied_to(trainer.model)


@pytest.mark.parametrize("rewind", ["0it", "1it", "1ep"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_at_rate_0_every_level_is_the_first(rewind: str, optimizer: Any, tmp_path: Path) -> None:
    """Bit for bit, where every batch is the same."""
    states, point = States(), {"0it": 0, "1it": 1, "1ep": 2}[rewind]
    ticket = LotteryTicket(Levels(2, rate=0.0), rewind=rewind)
    rows, batch = sentences(4) * 2, {"per_device_train_batch_size": 4, "max_steps": 6 + 2 * (6 - point)}
    trained(tmp_path, ticket, states, rows=rows, **{**optimizer, **LINEAR, **batch})
    first = states.after[point:6]
    assert all(same(one, other) for one, other in zip(states.after[6:], first * 2, strict=True))
    assert not same(first[-1], first[-2])


@pytest.mark.parametrize("mode", MODES)
def test_what_goes_back_is_what_was_asked_for(mode: Any, tmp_path: Path) -> None:
    ticket, states = LotteryTicket(Levels(1, rate=0.5), rewind=Rewind("1it", mode)), States()
    trained(tmp_path, ticket, states, max_steps=11, **{**ADAMW, **LINEAR})
    source = states.after[0] if mode in ("all", "weights") else states.after[5]
    assert ticket.masks is not None
    assert same(states.before[6], {n: v * ticket.masks[n] if n in ticket.masks else v for n, v in source.items()})
    goes_on = [states.rates[5]] * 5 if mode == "fine_tuning" else states.rates[1:6]
    assert states.rates[6:] == goes_on
    rewound, stayed = ticket.levels[1]["rewound"], ticket.levels[1]["kept"]
    assert ("weights" in rewound, "optimizers" in rewound) == (
        source is states.after[0],
        mode in ("all", "learning_rate"),
    )
    assert {*rewound, *stayed} == {
        "weights",
        "buffers",
        "optimizers",
        "schedulers",
        "random state",
        "data order",
        "counters",
    }
    assert (ticket.levels[0]["rewound"], ticket.levels[0]["kept"]) == ([], [])


def test_resumed_is_undisturbed(tmp_path: Path) -> None:
    """At the point, inside a level, at its end, and inside the last; with dropout."""

    def run(**more: Any) -> tuple[Trainer, LotteryTicket]:
        ticket = LotteryTicket(Levels(2, rate=0.5), rewind="2it", pruner=UNIFORM)
        options = {"max_steps": 14, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
        options |= {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": sentences(4)}
        return trained(tmp_path, ticket, model=bert(dropout=0.2), **options, **more), ticket

    whole, undisturbed = run()
    end = weights(whole.model)
    assert [row["steps"] for row in undisturbed.levels] == [6, 6, 6]
    assert all("eval_loss" in row["metrics"] for row in undisturbed.levels)
    for step in (2, 4, 6, 12):
        rest, ticket = run(resume=str(tmp_path / f"checkpoint-{step}"))
        assert same(weights(rest.model), end)
        assert [drop_time(row) for row in ticket.levels] == [drop_time(row) for row in undisturbed.levels]


def drop_time(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **{name: row[name]["eval_loss"] for name in ("metrics", "lowest", "highest")}}


def test_the_best_model_is_of_the_last_level(tmp_path: Path) -> None:
    ticket, losses = (
        LotteryTicket(Levels(2, rate=0.5), rewind="0it", pruner=UNIFORM),
        iter([1.0, 2.0, 3.0, 4.0, 8.0, 9.0]),
    )
    both = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    trainer = Trainer(
        bert(),
        arguments(tmp_path, max_steps=12, save_steps=2, eval_steps=2, **both, **best),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        compute_metrics=lambda _: {"made_up": next(losses)},
        callbacks=[ticket],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    assert [(r["metrics"]["eval_made_up"], r["lowest"]["eval_made_up"]) for r in ticket.levels] == [
        (2, 1),
        (4, 3),
        (9, 8),
    ]
    sizes = [mask.numel() for mask in masks().values()]
    assert alive(trainer.model) == sum(kept(size, 0.25) for size in sizes)


def test_a_second_training_keeps_the_ticket_and_another_model_starts_anew(tmp_path: Path) -> None:
    ticket, watch = LotteryTicket(Levels(1, rate=0.5), rewind="0it"), Watch()
    trainer = trained(tmp_path, ticket, max_steps=4)
    found, rows = ticket.masks, list(ticket.levels)
    trainer.add_callback(watch)
    trainer.train()
    assert ticket.masks == found
    assert set(watch.alive) == {kept(TOTAL, 0.5)}
    assert ticket.levels == rows
    again = Watch()
    trained(tmp_path, ticket, again, model=bert(seed=3), max_steps=4)
    assert again.alive == [TOTAL] * 2 + [kept(TOTAL, 0.5)] * 2


def test_a_hunt_that_is_stopped_says_so(tmp_path: Path) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    with pytest.warns(UserWarning, match="training ended with level 1 of 2"):
        trained(tmp_path, LotteryTicket(Levels(2, rate=0.5), rewind="0it"), Enough(), max_steps=6)


# Length and schedule


def test_lengths() -> None:
    for prunings in range(5):
        for point in range(4):
            for length in range(point + 1, 12):
                total = length + prunings * (length - point)
                assert level_length(total, prunings, point) == length
    with pytest.raises(
        ValueError, match=r"20 updates are not 3 levels .* to update 2: set max_steps to 20 or 21|to 20"
    ):
        level_length(21, 2, 2)
    with pytest.raises(ValueError, match=r"set max_steps to 20 for levels of 8 updates, or to 23 for 9"):
        level_length(22, 2, 2)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt", "constant"])
def test_the_schedule_of_a_level_is_the_trainers_of_its_length(kind: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=0.25)

    def made(steps: int) -> Any:
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.3}], lr=0.1)
        warmup = args.get_warmup_steps(steps)
        return get_scheduler(kind, optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=steps)

    ours, theirs = made(24), made(8)
    for _ in range(2):  # a second epoch divides again
        schedule_levels(args, ours, 24, 8)
    for _ in range(8):
        assert [g["lr"] for g in ours.optimizer.param_groups] == [g["lr"] for g in theirs.optimizer.param_groups]
        assert ours.get_last_lr() == theirs.get_last_lr()
        for each in (ours, theirs):
            each.optimizer.step()
            each.step()


def test_a_scheduler_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    args, optimizer = arguments(tmp_path), torch.optim.SGD([torch.zeros(1)], lr=0.1)
    own = torch.optim.lr_scheduler.LambdaLR(optimizer, own_lambda := lambda step: 1 / (1 + step))
    schedule_levels(args, own, 24, 8)
    assert own.lr_lambdas == [own_lambda]
    schedule_levels(args, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 24, 8)


# What cannot be


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (
            {"levels": 2, "rewind": "0it"},
            {"max_steps": 7},
            r"7 updates are not 3 levels .*: set max_steps to 6 .* or to 9",
        ),
        ({"levels": 1, "rewind": "9it"}, {"max_steps": 9}, "rewind is 9it, but a level trains for 9it only"),
        ({"levels": 1, "rewind": "1ep"}, {"num_train_epochs": 1}, "rewind is 1ep, but a level trains for 1ep only"),
    ],
)
def test_budgets_that_do_not_do(given: Any, options: Any, said: str, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, LotteryTicket(**{**given, "levels": Levels(given["levels"], rate=0.5)}), watch, **options)
    assert not watch.alive


def test_what_cannot_be_rewound_is_refused(tmp_path: Path) -> None:
    ticket: Any = LotteryTicket(levels=1, rewind="1it")
    with pytest.raises(ValueError, match="FSDP shards the model"):
        ticket.on_epoch_begin(SimpleNamespace(fsdp="full_shard"), None, None, train_dataloader=[])
    stream = SimpleNamespace(gradient_accumulation_steps=1, fsdp=None)
    with pytest.raises(ValueError, match="rewind is 1ep, but the data has no length"):
        LotteryTicket(levels=1).on_epoch_begin(stream, None, None, train_dataloader=iter([]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rewind.mode is 'none': choose one of"):
        LotteryTicket(levels=1, rewind=Rewind(mode="none"))  # type: ignore[arg-type]
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trained(tmp_path, **options)
    with pytest.raises(ValueError, match="training goes on at step 4, after the rewind point 1it: start anew"):
        trained(tmp_path, ticket, resume=str(tmp_path / "checkpoint-4"), **{**options, "max_steps": 9})


def _on_ranks(folder: Path) -> Any:
    ticket = LotteryTicket(Levels(2, rate=0.5), rewind="1it", pruner=UNIFORM)
    trainer = trained(folder, ticket, max_steps=7, ddp_backend="gloo")
    return [v.tolist() for v in weights(trainer.model).values()], [row["mask_hash"] for row in ticket.levels]


def test_ranks_hunt_alike(tmp_path: Path) -> None:
    one, other = on_ranks(_on_ranks, tmp_path)
    assert one == other
    assert len(set(one[1])) == 3
