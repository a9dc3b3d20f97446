"""Levels with rewinding inside one fit. What is compared is compared bit for bit."""

import copy
import functools
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from prune import LotteryTicket
from prune.levels import Levels
from prune.masks import Masks
from prune.rewinding.modes import Rewind
from prune.schedule import geometric, kept
from tests.helpers.lightning_training import ADAMW, SGD, TOTAL, two_optimizers
from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import BOTH, QUIET
from workbench.training.order import with_epoch_order
from workbench.training.resume import ResumeState

BATCHES = 6


def net(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Dropout(dropout), nn.Linear(10, 3))


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(4 * BATCHES, 6, generator=draw), torch.randint(0, 3, (4 * BATCHES,), generator=draw)
    )


class Augmented(TensorDataset):
    """Each time another view of a sample, drawn from the global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


def shuffled(**options: Any) -> DataLoader:
    return DataLoader(Augmented(*data().tensors), 4, shuffle=True, **options)


def theirs(namespace: Any = lp, optimizer: Any = SGD, scheduler: Any = None, dropout: float = 0.2) -> Any:
    class Theirs(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net(dropout)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            made = optimizer(self.parameters())
            if scheduler is None:
                return made
            made_too = scheduler(made)
            interval = "step" if isinstance(made_too, OneCycleLR) else "epoch"
            return [made], [{"scheduler": made_too, "monitor": "val", "interval": interval}]

    return Theirs()


class Watch(lp.Callback, pl.Callback):  # type: ignore[misc]
    """What every batch and epoch of every level came to."""

    def __init__(self, ticket: LotteryTicket) -> None:
        self.ticket = ticket
        self.batches: list[dict[tuple[int, int], Any]] = []
        self.epochs: list[list[dict[str, float]]] = []
        self.starts: list[dict[str, Tensor]] = []
        self.calls: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("start")
        torch.rand(3)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("end")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        begins = len(self.batches) == self.ticket.policy.level
        while len(self.batches) <= self.ticket.policy.level:
            self.batches.append({})
            self.epochs.append([])
            self.starts.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})
            for name, mask in self.ticket.masks.items():
                for optimizer in trainer.optimizers:
                    state = optimizer.state.get(pl_module.network.get_parameter(name), {})
                    held = [value for key, value in state.items() if key != "step" and value is not None]
                    assert not begins or not any(value[~mask].any() for value in held)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        weights = [value.clone() for value in pl_module.state_dict().values()]
        where = trainer.current_epoch, batch_idx
        assert where not in self.batches[-1]
        self.batches[-1][where] = (trainer.global_step, rates, weights, batch[0])
        masks = self.ticket.masks
        assert masks is not None
        assert not any(pl_module.network.get_parameter(name)[~mask].any() for name, mask in masks.items())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs[-1].append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def ends(self) -> list[list[Tensor]]:
        return [next(reversed(batches.values()))[2] for batches in self.batches]


def fit(
    module: Any,
    ticket: Any,
    *callbacks: Any,
    namespace: Any = lp,
    loader: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Watch:
    keeping = any(isinstance(c, lp.callbacks.Checkpoint | pl.callbacks.Checkpoint) for c in callbacks)
    watch = Watch(ticket)
    options = {"max_epochs": 3, **QUIET, "enable_checkpointing": keeping, **options}
    trainer = namespace.Trainer(**options, callbacks=[ticket, watch, *callbacks])
    loader = shuffled() if loader is None else loader
    torch.manual_seed(5)
    validation = DataLoader(data(), 8) if module.automatic_optimization else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    assert not any(callable(value) for value in vars(trainer.fit_loop).values())
    assert not [value for value in vars(trainer.fit_loop.epoch_loop).values() if type(value).__name__ == "function"]
    return watch


def alike(one: Any, other: Any) -> bool:
    """Equal, to the bit, containers of tensors and values."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


# A level at rate 0


CLIP: dict[str, Any] = {"gradient_clip_val": 0.5}
STEPS: dict[str, Any] = {"max_steps": 15, "max_epochs": -1}
GATHER: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3, "val_check_interval": 3}


@pytest.mark.parametrize(
    ("namespace", "rewind", "options", "left"),
    [
        (lp, "0it", CLIP, 0),
        (lp, "1ep", CLIP, 6),
        (lp, "2it", STEPS, 2),
        (lp, "9it", STEPS, 9),
        (lp, "2it", GATHER, 4),
        (lp, "6it", GATHER, 12),
        (pl, "0it", GATHER, 0),
        (pl, "1ep", STEPS, 6),
        (pl, "9it", CLIP, 9),
    ],
)
def test_rate_0_repeats_level_0(namespace: Any, rewind: str, options: dict[str, Any], left: int) -> None:
    """Pitfalls "Pruning and tickets" 4, with dropout, batch norm, shuffling, a schedule and validation."""
    ticket = LotteryTicket(Levels(2, rate=0.0), rewind=rewind)
    scheduler = functools.partial(CosineAnnealingLR, T_max=4)
    watch = fit(theirs(namespace, ADAMW, scheduler), ticket, namespace=namespace, **options)
    first = watch.batches[0]
    assert watch.calls == ["start", "end"]
    assert len({float(record[1][0]) for record in first.values()}) > 1
    for batches, epochs in zip(watch.batches[1:], watch.epochs[1:], strict=True):
        assert list(batches) == list(first)[left:]
        for where, record in batches.items():
            assert alike(record, first[where]), where
        whole = epochs[
            1 if left % BATCHES else 0 :
        ]  # of the epoch that a level begins inside, the means are of its rest
        assert [{**epoch, "level": 0.0} for epoch in whole] == watch.epochs[0][len(watch.epochs[0]) - len(whole) :]
    assert [row["metrics"] for row in ticket.levels] == [ticket.levels[0]["metrics"]] * 3
    assert not any(row["stopped"] for row in ticket.levels)


@pytest.mark.parametrize(
    ("kind", "rewind"),
    [
        ("generator", "0it"),
        ("generator", "8it"),
        ("stateful", "1ep"),
        ("stateful", "8it"),
        ("two", "0it"),
        ("two", "8it"),
    ],
)
def test_the_order_of_the_data_goes_back(kind: str, rewind: str) -> None:
    class Two(type(theirs())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[batch_idx % 2], batch_idx)

    loader: Any = {
        "generator": shuffled(generator=torch.Generator().manual_seed(3)),
        "stateful": with_epoch_order(shuffled(), 7),
        "two": [shuffled(), shuffled(generator=torch.Generator())],
    }[kind]
    ticket = LotteryTicket(Levels(2, rate=0.0), rewind=rewind)
    watch = fit(Two() if kind == "two" else theirs(), ticket, loader=loader)
    first = watch.batches[0]
    seen = [record[3] for record in first.values()]
    assert not alike(seen[:BATCHES], seen[BATCHES : 2 * BATCHES])
    for batches in watch.batches[1:]:
        assert len(batches) == {"0it": 18, "1ep": 12, "8it": 10}[rewind]
        assert all(alike(record, first[where]) for where, record in batches.items())
    assert ticket.levels[1]["rewound"][-1] == "data order"


def test_workers_draw_the_same_again() -> None:
    ticket = LotteryTicket(Levels(1, rate=0.0), rewind="2it")
    watch = fit(theirs(), ticket, loader=shuffled(num_workers=1, persistent_workers=True), max_epochs=2)
    assert all(alike(record, watch.batches[0][where]) for where, record in watch.batches[1].items())


def asking(optimizer: Any = SGD) -> Any:
    """A module that asks how long training is: Lightning sets the loaders up before ``fit`` begins."""
    module = theirs(lp, optimizer, lambda made: OneCycleLR(made, 0.2, int(module.trainer.estimated_stepping_batches)))
    return module


@pytest.mark.parametrize("rewind", ["0it", "2it", "1ep"])
def test_a_schedule_may_ask_how_long_training_is(rewind: str) -> None:
    watch = fit(asking(), LotteryTicket(Levels(1, rate=0.0), rewind=rewind))
    first, again = watch.batches
    assert len({float(record[1][0]) for record in first.values()}) == 3 * BATCHES
    assert list(again) == list(first)[{"0it": 0, "2it": 2, "1ep": BATCHES}[rewind] :]
    assert all(alike(record, first[where]) for where, record in again.items())


# Against training by hand


def by_hand(
    optimizer: Any, rewind: int, levels: int, rate: float, epochs: int = 3
) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Algorithm 2 of Frankle et al. 2020 in a bare loop: every level ends with these weights under these masks."""
    model = net(0.0)
    made = optimizer(model.parameters())
    schedule = CosineAnnealingLR(made, epochs)
    weights = {name: p for name, p in model.named_parameters() if name in ("0.weight", "4.weight")}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in weights.items()}
    found = []
    point: Any = None
    for level in range(levels + 1):
        if level:
            scores = torch.cat([(p.abs() * masks[name] - 1.0 * ~masks[name]).flatten() for name, p in weights.items()])
            best = scores.sort(descending=True, stable=True).indices[: kept(TOTAL, (1 - rate) ** level)]
            flat = torch.zeros(TOTAL, dtype=torch.bool)
            flat[best] = True
            masks = dict(
                zip(
                    masks,
                    (part.view(10, 6) if i == 0 else part.view(3, 10) for i, part in enumerate(flat.split([60, 30]))),
                )
            )
            model.load_state_dict(point[0])
            made.load_state_dict(copy.deepcopy(point[1]))
            schedule.load_state_dict(copy.deepcopy(point[2]))
        step = rewind if level else 0
        while True:
            for name, weight in weights.items():
                weight.data[~masks[name]] = 0
                for value in made.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value[~masks[name]] = 0
            if step == rewind and not level:
                point = copy.deepcopy((model.state_dict(), made.state_dict(), schedule.state_dict()))
            if step == epochs * BATCHES:
                break
            x, y = (tensor[4 * (step % BATCHES) :][:4] for tensor in data().tensors)
            made.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            made.step()
            step += 1
            if step % BATCHES == 0:
                schedule.step()
        found.append(([p.detach().clone() for p in model.parameters()], masks))
    return found


@pytest.mark.parametrize(("optimizer", "rewind"), [(SGD, 0), (SGD, 8), (ADAMW, 6)])
def test_three_levels_are_those_of_a_bare_loop(optimizer: Any, rewind: int) -> None:
    """And theta_k does not drift: pitfalls "Pruning and tickets" 3."""
    ticket = LotteryTicket(Levels(3, rate=0.4), rewind=f"{rewind}it")
    module = theirs(lp, optimizer, functools.partial(CosineAnnealingLR, T_max=3), dropout=0.0)
    watch = fit(module, ticket, loader=DataLoader(data(), 4))
    expected = by_hand(optimizer, rewind, 3, 0.4)
    parameters = [name for name, _ in module.network.named_parameters()]
    for level, (weights, masks) in enumerate(expected):
        row = ticket.levels[level]
        assert row["density"] == kept(TOTAL, geometric(0.4, 3)[level]) / TOTAL
        assert row["mask_hash"] == Masks(masks).hash()
        state = dict(zip(module.state_dict(), watch.ends()[level]))
        assert alike([state[f"network.{name}"] for name in parameters], weights), level
        if level:
            point = watch.starts[1]
            for name, value in watch.starts[level].items():
                assert torch.equal(value, point[name] * masks[name] if name in masks else point[name])
    assert ticket.masks is not None
    assert ticket.masks == Masks(expected[-1][1])
    assert alike([p.detach() for p in module.network.parameters()], expected[-1][0])


# Stopped and resumed


class Keep(lp.callbacks.Checkpoint):
    """A checkpoint after every batch and every epoch."""

    def __init__(self, folder: Path, ticket: LotteryTicket) -> None:
        self.folder, self.ticket = folder, ticket

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{self.ticket.policy.level}-{trainer.global_step}")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{self.ticket.policy.level}-{trainer.global_step}")


def rows(ticket: LotteryTicket, without: set[str]) -> list[dict[str, Any]]:
    return [
        {k: {n: x for n, x in v.items() if n not in without} if isinstance(v, dict) else v for k, v in row.items()}
        for row in ticket.levels
    ]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("make", "rewind", "options", "points"),
    [
        (theirs, "0it", {"max_epochs": 2}, ["0-12", "2-7"]),
        (theirs, "1ep", {"max_steps": 9, "max_epochs": -1}, ["0-6", "1-9", "2-9"]),
        (theirs, "4it", {"max_epochs": 2}, ["0-2", "0-4", "1-8", "1-12"]),
        (asking, "2it", {"max_epochs": 2}, ["0-1", "1-8", "1-12"]),
        (theirs, Rewind("1ep", "fine_tuning"), {"max_epochs": 2}, ["0-6", "0-12", "1-15", "1-18", "2-16"]),
        (theirs, Rewind("2it", "weights"), {"max_epochs": 2}, ["0-12", "1-8"]),
    ],
)
def test_what_was_stopped_goes_on_as_if_it_had_not_been(
    make: Any, rewind: Any, options: dict[str, Any], points: list[str], tmp_path: Path
) -> None:
    def run(*more: Any, path: Path | None = None) -> tuple[Any, ...]:
        ticket, module = LotteryTicket(Levels(2, rate=0.3), rewind=rewind), make(optimizer=ADAMW)
        keep = [Keep(tmp_path, ticket)] if path is None else []
        watch = fit(
            module, ticket, ResumeState(), *keep, loader=with_epoch_order(shuffled(), 7), ckpt_path=path, **options
        )
        return watch, ticket, [value.clone() for value in module.state_dict().values()]

    watch, whole, bits = run()
    for point in points:
        again, ticket, found = run(path=tmp_path / point)
        assert alike(found, bits), point
        # A resumed epoch's means are over its rest; what is not logged again is not known any more.
        lost = {"loss", "loss_epoch"} if int(point[2:]) % BATCHES else set()
        lost |= {"val"} if "max_steps" in options else set()
        assert rows(ticket, lost) == rows(whole, lost), point
        assert ticket.masks == whole.masks
        if point == "2-9":  # the end
            assert again.batches == []
            continue
        assert sum(map(len, again.batches)) < sum(map(len, watch.batches))
        for mine, theirs_ in zip(reversed(again.batches), reversed(watch.batches)):
            assert all(alike(record, theirs_[where]) for where, record in mine.items()), point


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    ticket = LotteryTicket(Levels(1, rate=0.3), rewind="1it")
    fit(theirs(), ticket, Keep(tmp_path, ticket), max_epochs=1)
    state = torch.load(tmp_path / "1-6", weights_only=True)["callbacks"]["LotteryTicket"]
    assert state["level"] == 1
    with pytest.raises(
        ValueError, match=r"levels \[1\.0, 0\.8\] instead of \[1\.0, 0\.7\], rewind\.at 1ep instead of 1it"
    ):
        fit(theirs(), LotteryTicket(levels=1), ckpt_path=tmp_path / "1-6", max_epochs=1)


# Beside other callbacks


class Log(lp.loggers.Logger, pl.loggers.Logger):  # type: ignore[misc]
    """Rows of metrics with their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = "log"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:The number of training batches")
@BOTH
def test_levels_are_logged_and_keep_checkpoints_of_their_own(namespace: Any, tmp_path: Path) -> None:
    ticket, log = LotteryTicket(Levels(2, rate=0.5), rewind="1ep"), Log()
    keep = namespace.callbacks.ModelCheckpoint(tmp_path, "{level:.0f}-{epoch}", monitor="val", save_top_k=1)
    watch = fit(theirs(namespace), ticket, keep, namespace=namespace, logger=log, log_every_n_steps=1)
    epochs = [row for _, row in log.rows if "level" in row]
    assert [row["level"] for row in epochs] == [0, 0, 0, 1, 1, 2, 2]
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 1, 2, 1, 2]
    last = kept(TOTAL, 0.25) / TOTAL
    assert [row["density"] for row in epochs] == pytest.approx([1, 1, 1, 0.5, 0.5, last, last])
    assert {"density/0.weight", "density/4.weight"} <= set(epochs[-1])
    steps = [step for step, row in log.rows if "loss_step" in row]
    assert steps == list(range(len(steps)))  # as wandb wants them
    assert len(steps) == sum(map(len, watch.batches)) == 18 + 12 + 12
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name[6] for name in files] == ["0", "1", "2"]
    assert keep.best_model_path.endswith(files[-1])
    for level, (row, scores) in enumerate(zip(ticket.levels, watch.epochs, strict=True)):
        values = [epoch["val"] for epoch in scores]
        assert (row["level"], row["lowest"]["val"], row["highest"]["val"]) == (level, min(values), max(values))
        assert row["metrics"]["val"] == values[-1]
        assert row["steps"] == 18
    assert ticket.levels[0]["rewound"] == ticket.levels[0]["kept"] == []
    everything = ["weights", "buffers", "optimizers", "counters", "random state", "other callbacks", "data order"]
    assert (ticket.levels[1]["rewound"], ticket.levels[1]["kept"]) == (everything, [])
    assert ticket.masks is not None
    assert ticket.masks.hash() == ticket.levels[-1]["mask_hash"]


@BOTH
def test_a_request_to_stop_ends_the_level(namespace: Any) -> None:
    """And patience is that of the level."""
    ticket = LotteryTicket(Levels(2, rate=0.3), rewind="0it")
    stop = namespace.callbacks.EarlyStopping("val", patience=1, min_delta=10.0)
    watch = fit(theirs(namespace), ticket, stop, namespace=namespace, max_epochs=5)
    assert [len(batches) for batches in watch.batches] == [2 * BATCHES] * 3
    assert [row["stopped"] for row in ticket.levels] == [True] * 3
    assert [row["steps"] for row in ticket.levels] == [2 * BATCHES] * 3


def test_a_level_must_not_be_stopped_before_the_rewind_point() -> None:
    stop = lp.callbacks.EarlyStopping("val", patience=1, min_delta=10.0)
    with pytest.raises(ValueError, match="level 0 ended before the rewind point 3ep"):
        fit(theirs(), LotteryTicket(levels=1, rewind="3ep"), stop, max_epochs=5)


def test_plateaus_and_one_cycles_are_of_the_level() -> None:
    for scheduler in (
        functools.partial(ReduceLROnPlateau, patience=0, threshold=10.0),
        functools.partial(OneCycleLR, max_lr=0.2, total_steps=18),
    ):
        watch = fit(theirs(lp, SGD, scheduler), ticket := LotteryTicket(Levels(2, rate=0.0), rewind="1ep"))
        rates = [[record[1] for record in batches.values()] for batches in watch.batches]
        assert rates[0][6:] == rates[1] == rates[2]
        assert len({rate[0] for rate in rates[0]}) > 2
        assert "schedulers" in ticket.levels[1]["rewound"]


# What goes back


@pytest.mark.parametrize(
    ("mode", "model", "rest"),
    [("all", True, True), ("weights", True, False), ("learning_rate", False, True), ("fine_tuning", False, False)],
)
def test_what_goes_back_can_be_chosen(mode: Any, model: bool, rest: bool) -> None:
    """Rewinding, weight and learning-rate rewinding and fine-tuning (Renda et al. 2020), as in a hunt."""
    ticket = LotteryTicket(Levels(2, rate=0.5), rewind=Rewind("1ep", mode))
    watch = fit(theirs(lp, ADAMW, functools.partial(CosineAnnealingLR, T_max=4), 0.0), ticket)
    names = list(watch.starts[0])
    ends = [dict(zip(names, bits)) for bits in watch.ends()]
    point = dict(zip(names, watch.batches[0][(0, BATCHES - 1)][2]))
    masks = ticket.masks
    assert masks is not None
    for level in (1, 2):
        before = point if model else ends[level - 1]
        for name, value in watch.starts[level].items():
            live = value != 0 if name in masks else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[live], before[name][live]), name
    rates = [[record[1][0] for record in batches.values()] for batches in watch.batches]
    last_used = rates[0][-2]  # the last is noted after the schedule's step
    assert rates[0][-1] != last_used
    assert rates[1] == rates[2] == ([last_used] * 12 if mode == "fine_tuning" else rates[0][6:])
    steps = [[record[0] for record in batches.values()] for batches in watch.batches]
    first = 18 if mode == "fine_tuning" else 6
    assert steps[1] == steps[2] == list(range(first + 1, first + 13))
    seen = [[record[3] for record in batches.values()] for batches in watch.batches]
    assert alike(seen[1], seen[0][6:]) == (mode != "fine_tuning")
    row = ticket.levels[2]
    assert (("weights" in row["rewound"]), ("optimizers" in row["rewound"])) == (model, rest)
    assert (("weights" in row["kept"]), ("optimizers" in row["kept"])) == (not model, not rest)
    assert ("data order" in row["rewound"], "counters" in row["rewound"]) == (mode != "fine_tuning",) * 2
    assert "other callbacks" in row["rewound"]


def test_weight_rewinding_empties_the_optimizer_and_rewinds_its_schedule() -> None:
    sizes: list[int] = []

    class Sizes(lp.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(len(trainer.optimizers[0].state))

    for mode in ("weights", "all"):
        fit(theirs(lp, ADAMW), LotteryTicket(Levels(1, rate=0.5), rewind=Rewind("1ep", mode)), Sizes())  # type: ignore[arg-type]
    assert (sizes[18], sizes[30 + 18]) == (0, 6)


# Modules that step by hand


@pytest.mark.parametrize("rewind", ["0it", "4it", "1ep"])
def test_two_optimizers_stepped_by_hand(rewind: str) -> None:
    """Lightning counts two steps a batch."""
    ticket = LotteryTicket(Levels(2, rate=0.0), rewind=rewind)
    watch = fit(two_optimizers(network=net()), ticket, max_epochs=2)
    left = {"0it": 0, "4it": 2, "1ep": 6}[rewind]
    for batches in watch.batches[1:]:
        assert list(batches) == list(watch.batches[0])[left:]
        assert all(alike(record, watch.batches[0][where]) for where, record in batches.items())


def test_a_step_inside_a_batch_is_no_place_to_go_back_to() -> None:
    with pytest.raises(
        ValueError, match="rewind is 3it, but training went past step 3 inside a batch and is at step 4"
    ):
        fit(two_optimizers(network=net()), LotteryTicket(levels=1, rewind="3it"), max_epochs=2)


# Refusals and edges


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data())


class Backwards(Sampler):
    def __len__(self) -> int:
        return 4 * BATCHES

    def __iter__(self) -> Any:
        return iter(reversed(range(4 * BATCHES)))


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (DataLoader(Stream(), 4), "only Stream itself"),
        (DataLoader(data(), 4, sampler=Backwards()), "Backwards is a sampler"),
    ],
    ids=["stream", "sampler"],
)
def test_data_of_unknown_order(loader: DataLoader, said: str) -> None:
    """Between epochs the order is said not to go back; inside one there is no going back."""
    with pytest.warns(UserWarning, match=f"the order of the data is not rewound: {said}"):
        watch = fit(theirs(), ticket := LotteryTicket(Levels(1, rate=0.0), rewind="1ep"), loader=loader, max_epochs=2)
    assert ticket.levels[1]["kept"] == ["data order"]
    assert [len(batches) for batches in watch.batches] == [12, 6]
    with pytest.raises(ValueError, match=f"is inside an epoch, but {said}.*: rewind to the end of an epoch"):
        fit(theirs(), LotteryTicket(levels=1, rewind="2it"), loader=loader)


def test_what_cannot_be_right_is_refused() -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ({"rewind": "3ep"}, {}, "rewind is 3ep, but a level trains for 3ep only"),
        ({"rewind": "18it"}, {}, "rewind is 18it, but a level trains for 18it only"),
        ({}, {"max_time": {"hours": 1}}, "cannot run beside Timer: max_time is that of the whole fit"),
        ({}, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs is 1"),
    ]
    for arguments, options, said in wrong:
        with pytest.raises(ValueError, match=said):
            fit(theirs(), LotteryTicket(levels=1, **arguments), **options)
    average = lp.callbacks.WeightAveraging()
    with pytest.raises(ValueError, match="cannot run beside WeightAveraging"):
        fit(theirs(), LotteryTicket(levels=1), average)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give density .* or levels"),
        ({"levels": 1, "density": 0.5}, "give density .* or levels"),
        ({"levels": -1}, "levels is -1"),
        ({"levels": 1, "rewind": Rewind(order="fresh")}, "rewind.order is 'fresh', which needs a training of its own"),
        ({"density": 0.0}, "density is 0.0"),
        ({"levels": 1, "rewind": "1 epoch"}, "duration '1 epoch'"),
        ({"levels": Levels(1, max_drop=0.1)}, "trains all levels, and has no max_drop"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LotteryTicket(**arguments)


def test_density_gives_the_levels() -> None:
    assert LotteryTicket(Levels(density=0.1, rate=0.5)).policy.targets == [1, 0.5, 0.25, 0.125, 0.0625]


def test_a_layer_that_collapses_is_named() -> None:
    module = theirs()
    with torch.no_grad():
        module.network[4].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"layer collapse: '4\.weight'"):
        fit(module, LotteryTicket(Levels(1, rate=0.7), rewind="0it"), max_epochs=1, limit_train_batches=2)


def test_a_second_fit() -> None:
    """Of the ticket: it trains on under its masks. Of another network: a hunt."""
    module, ticket = theirs(), LotteryTicket(Levels(2, rate=0.5), rewind="0it")
    fit(module, ticket, max_epochs=1)
    masks, levels = ticket.masks, list(ticket.levels)
    watch = fit(module, again := copy.deepcopy(ticket), max_epochs=2)
    assert (again.masks, again.levels) == (masks, levels)
    assert [len(batches) for batches in watch.batches] == [0, 0, 2 * BATCHES]
    watch = fit(theirs(), again, max_epochs=1)
    assert [len(batches) for batches in watch.batches] == [BATCHES] * 3
    assert len(again.levels) == 3


def test_a_fit_that_failed_leaves_nothing_behind() -> None:
    class Fails(lp.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if ticket.policy.level == 1:
                raise RuntimeError("enough")

    ticket, module = LotteryTicket(Levels(2, rate=0.5), rewind="0it"), theirs()
    trainer = lp.Trainer(**QUIET, max_epochs=1, callbacks=[ticket, Fails()])
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(module, shuffled(), DataLoader(data(), 8))
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop)
    assert not [name for loop in loops for name, value in vars(loop).items() if type(value).__name__ == "function"]
    assert ticket.masks is not None
    watch = fit(module, ticket, max_epochs=1)
    assert [len(batches) for batches in watch.batches] == [BATCHES] * 3
    assert ticket.levels[0]["density"] == 1


def test_a_run_of_one_batch() -> None:
    ticket = LotteryTicket(Levels(2, rate=0.5), rewind="500it")
    fit(theirs(), ticket, fast_dev_run=True)
    assert [row["steps"] for row in ticket.levels] == [1, 1, 1]


def test_no_levels_left_is_said() -> None:
    class Enough(lp.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raise KeyboardInterrupt

    ticket = LotteryTicket(levels=2, rewind="0it")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(theirs(), ticket, Enough())
    assert ticket.policy.shortfall() == "level 0 of 2"


def test_a_parser_takes_it_in_either_namespace() -> None:
    for namespace in (lp, pl):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--callback", type=namespace.Callback)
        arguments = {
            "levels": {"density": 0.1, "rate": 0.3},
            "rewind": {"at": "100it", "mode": "weights"},
            "pruner": {"allocation": "uniform"},
        }
        given = {"class_path": "prune.LotteryTicket", "init_args": arguments}
        made = parser.instantiate(parser.parse_object({"callback": given})).callback
        assert isinstance(made, LotteryTicket)
        assert str(made.policy.rewind) == "100it"


def hunted(folder: Path) -> Any:
    def run(*more: Any, path: Path | None = None) -> tuple[Any, ...]:
        module, ticket = theirs(), LotteryTicket(Levels(2, rate=0.3), rewind="2it")
        keep = [Keep(folder, ticket)] if path is None else []
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
        watch = fit(module, ticket, ResumeState(), *keep, loader=shuffled(), ckpt_path=path, **options)
        bits = [p.tolist() for p in module.network.parameters()]
        inputs = [[record[3].tolist() for record in batches.values()] for batches in watch.batches]
        return [row["mask_hash"] for row in ticket.levels], bits, inputs

    whole = run()
    return *whole, run(path=folder / "1-6")


def test_two_ranks_find_the_same_ticket(tmp_path: Path) -> None:
    """Each with its own random numbers and its own part of the data, also when it is resumed."""
    one, other = on_ranks(hunted, tmp_path)
    assert one[:2] == other[:2]
    assert len(set(one[0])) == 3
    for _, bits, inputs, resumed in (one, other):
        assert [len(batches) for batches in inputs] == [6, 4, 4]
        assert inputs[1] == inputs[0][2:] == inputs[2]
        assert resumed == (one[0], bits, [[], [], inputs[2]])
    assert one[2] != other[2]
