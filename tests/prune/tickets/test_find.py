"""A hunt over a bare function: the same promises as over a Trainer, in a loop that is anybody's."""

import doctest
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import prune.tickets.find
from prune import Masks, Pruner, find_tickets
from prune.levels import Levels
from prune.rewinding.modes import MODES, Rewind
from prune.tickets.controls import Controls
from tests.helpers.hunt_training import same, weights
from tests.helpers.ranks import on_ranks
from workbench import load
from workbench.checkpoints import compact

TOTAL, POINT = 14, 5


class Stop(RuntimeError):
    pass


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))


def data() -> TensorDataset:
    noise = torch.Generator().manual_seed(3)
    labels = torch.arange(36) % 3
    return TensorDataset(torch.randn(36, 5, generator=noise) + nn.functional.one_hot(labels, 5), labels)


def accuracy(model: nn.Module) -> dict[str, Any]:
    inputs, labels = data().tensors
    model.eval()
    with torch.no_grad():
        return {"val/accuracy": (model(inputs).argmax(1) == labels).float().mean(), "test/loss": 1}


class Training:
    """A loop over batches under momentum, decay and a schedule, that remembers what it did and can be stopped."""

    def __init__(self, schedule: Callable[..., Any] | None = None, left: int = -1, optimizer: Any = None) -> None:
        self.schedule, self._left = schedule, left
        self.optimizer = optimizer or functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, level: Any) -> Mapping[str, Any]:
        optimizer = self.optimizer(model.parameters())
        scheduler = self.schedule(optimizer) if self.schedule else None
        level.begin(optimizer, scheduler)
        now: dict[str, Any] = {
            "level": level,
            "began": level.step,
            "weights": {name: value.clone() for name, value in model.state_dict().items()},
            "state": len(optimizer.state),
            "rates": [],
            "seen": [],
        }
        self.calls.append(now)
        for inputs, labels in level.batches(DataLoader(data(), 6, shuffle=True), TOTAL):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            now["rates"].append(optimizer.param_groups[0]["lr"])
            now["seen"].append(inputs)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            assert level.masks is None or level.masks.is_applied_to(model)
            self._left -= 1
            if self._left == 0:
                raise Stop
        return accuracy(model)


COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=TOTAL)
CYCLE = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=TOTAL)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


def hunted(out: Path, train: Any, model: nn.Module | None = None, **options: Any) -> list[dict[str, Any]]:
    options = {"density": [0.6, 0.3], "rewind": f"{POINT}it", "checkpoint": "4it", "seed": 7, **options}
    return find_tickets(net() if model is None else model, train, out=out, **options)


def test_the_example_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = [each for each in doctest.DocTestFinder().find(prune.tickets.find) if each.examples]
    assert len(example.examples) > 10
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("mode", MODES)
def test_where_a_level_starts(tmp_path: Path, mode: Any) -> None:
    train = Training(COSINE)
    levels = hunted(tmp_path, train, rewind=Rewind(f"{POINT}it", mode))
    dense, *rest = train.calls
    for number, call in enumerate(rest, 1):
        masks = compact.masks(tmp_path / f"level_{number:02d}")
        assert Masks(masks) == call["level"].masks
        began = TOTAL if mode == "fine_tuning" else POINT
        assert levels[number]["steps"] == [began, began + TOTAL - POINT]
        assert call["rates"] == ([dense["rates"][-1]] * (TOTAL - POINT) if began == TOTAL else dense["rates"][POINT:])
        assert call["state"] == (0 if mode == "weights" else 6)
        if mode != "fine_tuning":  # whose epochs are new ones
            assert all(torch.equal(one, other) for one, other in zip(call["seen"], dense["seen"][POINT:], strict=True))
        if mode in ("learning_rate", "fine_tuning"):
            trained = weights(tmp_path, number - 1)
            assert same(call["weights"], {n: v * masks[n] if n in masks else v for n, v in trained.items()})
    if mode in ("all", "weights"):
        for name, value in rest[0]["weights"].items():
            mask = compact.masks(tmp_path / "level_02").get(name)
            assert torch.equal(rest[1]["weights"][name], value if mask is None else value * mask), name


def test_rate_zero_repeats_level_zero_bit_for_bit(tmp_path: Path) -> None:
    for rewind in ("0it", "5it"):
        out = tmp_path / rewind
        levels = hunted(out, Training(CYCLE, optimizer=ADAMW), density=None, levels=Levels(1, rate=0.0), rewind=rewind)
        assert same(weights(out, 0), weights(out, 1))
        assert levels[0]["metrics"] == levels[1]["metrics"]


def test_a_hunt_equals_one_written_by_hand(tmp_path: Path) -> None:
    """The first two levels, from the definition: train, prune, go back, train under the mask."""
    train = Training(COSINE)
    hunted(tmp_path, train, density=[0.5])
    seen, rates = train.calls[0]["seen"], train.calls[0]["rates"]
    model = net()
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    kept: dict[str, Any] = {}
    for step in range(TOTAL):
        if step == POINT:
            kept = {
                "weights": {name: value.clone() for name, value in model.state_dict().items()},
                "momentum": [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()],
                "random": torch.get_rng_state(),
            }
        _update(model, optimizer, rates[step], seen[step])
    assert same(weights(tmp_path, 0), dict(model.state_dict()))
    masks = Pruner(seed=7)(model, 0.5)
    model.load_state_dict(kept["weights"])
    for parameter, momentum in zip(model.parameters(), kept["momentum"]):
        optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
    torch.set_rng_state(kept["random"])
    masks.apply(model)
    masks.clear_state(optimizer, model)
    for step in range(POINT, TOTAL):
        _update(model, optimizer, rates[step], seen[step])
        masks.apply(model)
    assert same(weights(tmp_path, 1), dict(model.state_dict()))


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, inputs: Tensor) -> None:
    everything, labels = data().tensors
    target = torch.stack([labels[(everything == row).all(1)][0] for row in inputs])
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), target).backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["all", "fine_tuning"])
def test_killed_again_and_again_it_ends_as_undisturbed(tmp_path: Path, mode: Any) -> None:
    controls = ["reinit", "dense"] if mode == "fine_tuning" else []
    options: dict[str, Any] = {"rewind": Rewind(f"{POINT}it", mode, "fresh"), "controls": controls, "density": [0.5]}
    whole = hunted(tmp_path / "whole", Training(CYCLE, optimizer=ADAMW), **options)
    stops = 0
    for left in [6, 11, 5, 8, 13, 4, 12, 7, -1]:
        try:
            pieces = hunted(tmp_path / "pieces", Training(CYCLE, left, ADAMW), **options)
        except Stop:
            stops += 1
            continue
        break
    assert stops >= 3
    for one, other in zip(whole, pieces, strict=True):
        for a, b in [
            (one, other),
            *((one["controls"][arm], other["controls"][arm]) for arm in one.get("controls", ())),
        ]:
            for key in ("metrics", "mask_hash", "steps", "rewind"):
                assert a[key] == b[key]
    for level in range(2):
        assert same(weights(tmp_path / "whole", level), weights(tmp_path / "pieces", level))
    assert not list((tmp_path / "pieces").rglob("last.pt"))


def test_the_model_ends_with_the_last_level_which_loads_without_the_hunt(tmp_path: Path) -> None:
    model = net()
    levels = hunted(tmp_path, Training(), model)
    assert same(dict(model.state_dict()), weights(tmp_path, 2))
    assert same(dict(load(tmp_path / "level_02", model=net()).state_dict()), weights(tmp_path, 2))
    assert [level["density"] for level in levels] == pytest.approx([1, 0.6, 0.3], abs=0.01)
    assert levels[1]["rewind"]["at"] == "point"
    state = torch.get_rng_state()
    hunted(tmp_path, Training())
    assert torch.equal(state, torch.get_rng_state())


def test_a_loop_of_numbers_with_a_scaler_and_several_optimizers(tmp_path: Path) -> None:
    def train(model: nn.Module, level: Any) -> dict[str, float]:
        first, last = (torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 4))  # type: ignore[index]
        scaler = torch.amp.GradScaler("cpu")
        level.begin([first, last], [COSINE(first), COSINE(last)], scaler)
        inputs, labels = data().tensors
        for step in range(level.step, level.until(TOTAL)):
            loss = nn.functional.cross_entropy(model(inputs[step % 5 :: 5]), labels[step % 5 :: 5])
            scaler.scale(loss).backward()
            for optimizer in (first, last):
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            level.advance()
        return accuracy(model)  # type: ignore[return-value]

    levels = hunted(tmp_path, train, density=[1.0, 0.5], levels=None, rewind=Rewind(f"{POINT}it", "fine_tuning"))
    assert levels[1]["steps"] == [TOTAL, TOTAL + TOTAL - POINT]


def test_criteria_are_shown_batches_and_the_loss(tmp_path: Path) -> None:
    loader = DataLoader(data(), 12)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    hunted(tmp_path, Training(), pruner=Pruner("taylor", allocation="uniform"), loader=loader, loss=loss)
    with pytest.raises(ValueError, match="taylor"):
        hunted(tmp_path / "b", Training(), pruner=Pruner("taylor"))


def test_levels_of_another_hunt_and_altered_files_are_refused(tmp_path: Path) -> None:
    hunted(tmp_path, Training())
    other = net()
    with torch.no_grad():
        other.get_parameter("0.weight").mul_(2)
    for options in ({"seed": 8}, {"model": other}, {"train": Training().__call__}):
        given = {"train": Training(), **options}
        with pytest.raises(ValueError, match="another hunt"):
            hunted(tmp_path, given.pop("train"), **given)
    (tmp_path / "level_02" / "record.json").unlink()
    point = tmp_path / "checkpoints" / "rewind.pt"
    whole = point.read_bytes()
    point.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="was altered"):
        hunted(tmp_path, Training())
    point.write_bytes(whole)
    last = tmp_path / "level_02" / "checkpoints" / "last.pt"
    last.parent.mkdir()
    last.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"last.pt is damaged .* remove it to train this level from where it starts"):
        hunted(tmp_path, Training())
    last.unlink()
    hunted(tmp_path, Training())


def careless(model: nn.Module, level: Any, what: str) -> Any:
    """A function with one mistake."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if what != "no begin":
        level.begin(optimizer)
    if what == "twice":
        level.begin(optimizer)
    stray = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = data().tensors
    for _ in range(level.step, {"no update": 0, "short": POINT}.get(what, TOTAL)):
        nn.functional.cross_entropy(model(inputs), labels).backward()
        (stray if what == "stray" else optimizer).step()
        level.advance()
    if what == "own sampler":
        next(level.batches(DataLoader(data(), 6, sampler=SequentialSampler(range(3))), 99))
    return {"no metrics": None, "no monitor": {"accuracy": 1.0}}.get(what, accuracy(model))


MISTAKES = {
    "no begin": "has not begun: call level.begin",
    "twice": "begin was called before",
    "no update": "made no update at level 0, which begins at step 0",
    "short": "rewind is 5it, but the function made 5 updates only",
    "stray": "pruned weights moved: give level.begin all optimizers",
    "own sampler": "order of this loader cannot be repeated",
    "no metrics": "the function returned NoneType: return metrics by name, with 'val/accuracy'",
    "no monitor": r"the function returned \['accuracy'\]",
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_of_the_function_are_named(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[what]):
        hunted(tmp_path, functools.partial(careless, what=what))


def test_a_fine_tuning_that_ends_where_it_begins_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no update at level 1, which begins at step 14: .*level.until"):
        hunted(tmp_path, functools.partial(careless, what=""), rewind=Rewind(f"{POINT}it", "fine_tuning"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": "1ep"}, "rewind is 1ep: a function counts updates only, give 500it"),
        ({"checkpoint": "0it"}, "checkpoint is 0it"),
        ({"controls": ["ticket"]}, "controls has 'ticket': choose from"),
        ({"controls": Controls(connectivity=True)}, "controls.connectivity needs a LightningModule"),
        ({"density": None, "levels": Levels(2, early_stop=3)}, "levels.early_stop needs a LightningModule"),
        ({"density": 2.0}, "density is 2"),
        ({"pruner": Pruner(include=["encoder*"])}, "encoder"),
    ],
)
def test_mistakes_of_the_call_are_named_before_training(tmp_path: Path, options: Any, message: str) -> None:
    train = Training()
    with pytest.raises(ValueError, match=message):
        hunted(tmp_path, train, **options)
    assert not train.calls


def test_ranks_share_one_hunt(tmp_path: Path) -> None:
    one, other = on_ranks(_ranks, tmp_path)
    assert one == other
    assert [each["world_size"] for each in one] == [2, 2]


def _ranks(out: Path) -> Any:
    torch.distributed.init_process_group("gloo")
    levels = hunted(out, averaged, density=[0.5])
    return [{key: level[key] for key in ("mask_hash", "metrics", "steps", "world_size")} for level in levels]


def averaged(model: nn.Module, level: Any) -> dict[str, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    level.begin(optimizer)
    for inputs, labels in level.batches(DataLoader(data(), 4, shuffle=True), TOTAL):
        nn.functional.cross_entropy(wrapped(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"val/accuracy": 0.5}
