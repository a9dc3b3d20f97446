"""The hunt: rewinding is exact, levels are exactly as dense as said, a stopped hunt ends as an undisturbed one."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from prune.callbacks import KeepMasked
from prune.levels import Levels
from prune.masks import Masks
from prune.pruner import Pruner
from prune.rewinding.modes import Rewind
from prune.schedule import geometric, kept
from prune.tickets.controls import Controls, Interpolation
from prune.tickets.hunt import hunt
from prune.tickets.scores import sparsest_winning
from tests.helpers.trainers import Stop, StopAfter
from workbench import load, records
from workbench.checkpoints import compact
from workbench.data import Digits
from workbench.duration import Duration
from workbench.launcher import recipe as recipes
from workbench.launcher.runner import StageError
from workbench.launcher.runner import run as run_recipe
from workbench.models import MLP
from workbench.records.source import Source

CPU = {"accelerator": "cpu", "enable_progress_bar": False}
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
ADAMW = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)


class Noisy(nn.Module):
    """Batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {}
        self.layers = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def run(out: Path, model: nn.Module | None = None, trainer: dict[str, Any] | None = None, **options: Any) -> dict:
    lp.seed_everything(1, verbose=False)
    model = Noisy() if model is None else model
    given = {**CPU, "max_epochs": 2, **(trainer or {})}
    if isinstance(options.get("rewind"), str):
        options["rewind"] = Duration.parse(options["rewind"])
    return hunt(model=model, data=Digits(batch_size=128), trainer=given, out=out, seed_everything=1, **options)


def seeded(model: Callable[[], nn.Module]) -> nn.Module:
    """The same one every time: what was trained meanwhile is another."""
    lp.seed_everything(1, verbose=False)
    return model()


PLATEAU = functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.9)
COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2)
POINTS = {
    "initial weights": ("0it", {}, {}),
    "middle of the first epoch": ("4it", {}, {}),
    "end of the first epoch": ("1ep", {}, {"optimizer": SGD, "lr_scheduler": COSINE}),
    "end of the first epoch, in steps": ("10it", {}, {"optimizer": SGD, "lr_scheduler": PLATEAU}),
    "middle of the second epoch": ("13it", {}, {"optimizer": SGD, "lr_scheduler": PLATEAU}),
    "accumulated": ("3it", {"accumulate_grad_batches": 2}, {"optimizer": ADAMW}),
    "by steps": ("13it", {"max_epochs": None, "max_steps": 17}, {}),
}


@pytest.mark.parametrize("point", POINTS, ids=POINTS)
def test_rate_zero_makes_level_one_equal_level_zero(tmp_path: Path, point: str) -> None:
    rewind, trainer, options = POINTS[point]
    result = run(tmp_path, None, trainer, levels=Levels(1, rate=0.0), rewind=rewind, **options)
    zero, one = (compact.tensors(tmp_path / f"level_{level:02d}") for level in (0, 1))
    assert zero.keys() == one.keys()
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert result["levels"][0]["metrics"] == result["levels"][1]["metrics"]
    assert result["levels"][0]["history"] == result["levels"][1]["history"]


CHOICES = [
    {"criterion": "snip", "allocation": "uniform"},
    {"criterion": "wanda", "structure": "balanced", "allocation": "layerwise"},
    {"criterion": "movement", "structure": "channel", "allocation": "uniform", "exclude": ["layers.4.*"]},
    {"criterion": "magnitude", "structure": "2:4", "allocation": "erk"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(map(str, choice.values())))
def test_any_criterion_structure_and_allocation(tmp_path: Path, choice: dict[str, Any]) -> None:
    """Nested, as dense as said, and the same when a level is made again from the one before."""

    def model() -> nn.Module:
        return MLP(64, [24], 10) if choice["criterion"] == "wanda" else Noisy()

    options: dict[str, Any] = {"levels": Levels(density=0.2, rate=0.5), "batches": 3, "pruner": Pruner(**choice)}
    run(tmp_path, seeded(model), {"max_epochs": 1}, rewind="1it", **options)
    masks = [Masks(compact.masks(tmp_path / f"level_{level:02d}")) for level in range(1, 4)]
    assert masks[2].is_subset(masks[1])
    assert masks[1].is_subset(masks[0])
    assert masks[2].density == pytest.approx(0.125, abs=0.06)
    shutil.rmtree(tmp_path / "level_03")
    lost = masks[2]
    run(tmp_path, seeded(model), {"max_epochs": 1}, rewind="1it", **options)
    assert Masks(compact.masks(tmp_path / "level_03")) == lost


def test_a_density_that_the_structure_does_not_allow_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"density 0\.8 is above the 0\.5 that NM\(n=2, m=4\) allows"):
        run(tmp_path, None, levels=2, pruner=Pruner(structure="2:4"), rewind="0it")
    assert not (tmp_path / "level_00").exists()


def test_rewinding_three_times_starts_from_the_same_weights(tmp_path: Path) -> None:
    """Lightning's ModelPruning aliases its "initial" weights on CPU, and they drift."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(lp.Callback):
        def on_train_batch_start(self, trainer: lp.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5 and len(seen) < 4:
                seen.append({name: value.clone() for name, value in module.network.state_dict().items()})

        def __deepcopy__(self, memo: Any) -> "Watch":
            return self

    run(tmp_path, None, {"callbacks": [Watch()]}, levels=Levels(3, rate=0.3), rewind="5it")
    assert len(seen) == 4
    for level in (1, 2, 3):
        masks = compact.masks(tmp_path / f"level_{level:02d}")
        for name, value in seen[0].items():
            expected = value * masks[name] if name in masks else value
            assert torch.equal(seen[level][name], expected), f"level {level}, {name}"


@pytest.mark.parametrize("allocation", ["global", "uniform", "layerwise"])
def test_levels_keep_exactly_what_they_say(tmp_path: Path, allocation: str) -> None:
    result = run(
        tmp_path,
        MLP(64, [20], 10),
        {"max_epochs": 1},
        levels=Levels(3, rate=0.4),
        rewind="0it",
        pruner=Pruner(allocation=allocation),
    )
    total = 64 * 20 + 20 * 10
    before: Masks | None = None
    for level, density in enumerate(geometric(0.4, 3)):
        folder = tmp_path / f"level_{level:02d}"
        masks = Masks(compact.masks(folder))
        if allocation != "layerwise":
            assert sum(mask.sum().item() for mask in masks.values()) == kept(total, density)
        assert masks.hash() == result["levels"][level]["mask_hash"]
        assert result["levels"][level]["density"] == masks.density
        assert before is None or masks.is_subset(before)
        weights = load(folder).state_dict()
        assert all(not weights[name][~mask].any() for name, mask in masks.items())
        before = masks
    assert result["size"]["kept"] == result["levels"][-1]["size"]["kept"] < result["size"]["prunable"] == total


def test_pruned_weights_stay_zero_under_momentum_and_decay(tmp_path: Path) -> None:
    steps: list[bool] = []

    class Watch(lp.Callback):
        def on_train_batch_end(self, trainer: lp.Trainer, module: Any, *_: Any) -> None:
            for keeper in (callback for callback in trainer.callbacks if isinstance(callback, KeepMasked)):
                assert keeper.masks is not None
                pruned = [module.network.get_parameter(name)[~mask] for name, mask in keeper.masks.items()]
                steps.append(all(len(weights) > 0 and not weights.any() for weights in pruned))

        def __deepcopy__(self, memo: Any) -> "Watch":
            return self

    trainer = {"callbacks": [Watch()], "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    run(tmp_path, None, trainer, levels=Levels(1, rate=0.5), rewind="1it", optimizer=ADAMW)
    assert len(steps) == 18, "every batch of level 1 after the two that the rewind point holds"
    assert all(steps)


def test_a_stopped_hunt_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    StopAfter.left = 0

    options: dict[str, Any] = {
        "levels": Levels(2, rate=0.5),
        "rewind": "3it",
        "checkpoint": Duration(4, "it"),
        "optimizer": SGD,
    }
    whole = run(tmp_path / "whole", **options)
    stops = [2, 5, 14, 9, 8, 13, 6, 0]
    for left in stops:
        StopAfter.left = left
        try:
            pieces = run(tmp_path / "pieces", None, {"callbacks": [StopAfter()]}, **options)
        except Stop:
            continue
    for level in range(3):
        a, b = (compact.tensors(tmp_path / name / f"level_{level:02d}") for name in ("whole", "pieces"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        for key in ("metrics", "mask_hash", "history", "density"):
            assert whole["levels"][level][key] == pieces["levels"][level][key]
    assert not list((tmp_path / "pieces").rglob("last.ckpt")), "a finished level keeps no checkpoint to resume from"


def test_a_level_without_a_record_is_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")
    (tmp_path / "level_02" / "record.json").unlink()
    second = run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")
    assert [level["mask_hash"] for level in first["levels"]] == [level["mask_hash"] for level in second["levels"]]
    assert first["metrics"] == second["metrics"]


def test_an_altered_or_missing_rewind_point_is_refused(tmp_path: Path) -> None:
    run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")
    shutil.rmtree(tmp_path / "level_02")
    point = tmp_path / "checkpoints" / "rewind.ckpt"
    content = bytearray(point.read_bytes())
    content[len(content) // 2] ^= 1
    point.write_bytes(content)
    with pytest.raises(ValueError, match="was altered"):
        run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")
    point.unlink()
    with pytest.raises(ValueError, match="is missing"):
        run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")


def test_the_levels_of_another_hunt_are_refused(tmp_path: Path) -> None:
    run(tmp_path, levels=Levels(1, rate=0.5), rewind="1it")
    with pytest.raises(ValueError, match="level of another hunt"):
        run(tmp_path, levels=Levels(1, rate=0.4), rewind="1it")


def test_the_winning_level_is_chosen_on_validation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, levels=Levels(2, rate=0.5), rewind="1it")
    scores = [(0.9, 0.9), (0.895, 0.5), (0.7, 0.99)]  # level 2 is best on test data, worst on validation data
    for level, (val, test) in enumerate(scores):
        folder = tmp_path / f"level_{level:02d}"
        record = records.read(folder)
        assert record is not None
        record["metrics"] |= {"val/accuracy": val, "test/accuracy": test}
        records.write(folder, record)
    assert run(tmp_path, levels=Levels(2, rate=0.5, tolerance=0.01), rewind="1it")["winning"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give density .* or levels"),
        ({"density": 0.1, "levels": 3}, "only one of them"),
        ({"density": 1.5}, "density is 1.5"),
        ({"levels": {"count": 2, "rate": 1.0}}, "rate is 1.0"),
        ({"levels": 1, "rewind": "9ep"}, "rewind is 9ep, 90 steps, but a level trains for 20 steps only"),
        ({"levels": 1, "rewind": "20it"}, "rewind is 20it, 20 steps, but a level trains for 20 steps only"),
        ({"levels": 1, "rewind": "1it", "pruner": Pruner(include=["encoder.*"])}, "encoder"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    levels = options.get("levels")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{**options, **({"levels": Levels(**levels)} if isinstance(levels, dict) else {})})
    assert not (tmp_path / "level_00" / "record.json").exists()


def test_start_and_model_are_one_or_the_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to hunt in"):
        hunt(levels=1, out=tmp_path)
    with pytest.raises(ValueError, match="model is given beside start"):
        hunt(start=str(tmp_path), model=Noisy(), levels=1, out=tmp_path)  # type: ignore[arg-type]


def test_a_diverged_level_is_not_pruned(tmp_path: Path) -> None:
    explode = functools.partial(torch.optim.SGD, lr=1e30)
    with pytest.raises(ValueError, match="diverged"):
        run(tmp_path / "watched", levels=1, rewind="1it", optimizer=explode)
    with (
        pytest.warns(UserWarning, match="not finite after training"),
        pytest.raises(ValueError, match="diverged"),
    ):
        run(tmp_path / "unwatched", levels=1, rewind="1it", optimizer=explode, controls=Controls(diagnose=False))


def test_what_a_level_is_like_is_recorded(tmp_path: Path) -> None:
    controls = Controls(("shuffled",), connectivity=True)
    result = run(tmp_path, levels=Levels(2, rate=0.6), rewind="1it", controls=controls)
    dense, one, two = result["levels"]
    assert dense["diagnosis"]["units"] == 24
    assert one["controls"]["shuffled"]["diagnosis"]["gradient_flow"] > 0
    trainings = [each for record in result["levels"] for each in (record, *record.get("controls", {}).values())]
    assert len(trainings) == 5
    assert result["seconds"] == pytest.approx(sum(each["seconds"] for each in trainings)), "with those of its controls"
    assert [len(level.get("mask_distances", [])) for level in (dense, one, two)] == [1, 1, 0]
    assert "levels" not in dense["connectivity"]
    for level in (one, two):
        for pair in ("orders", "levels"):
            found = level["connectivity"][pair]["val"]
            assert len(found["heights"]) == 11
            assert found["ends"][0] == pytest.approx(1 - level["metrics"]["val/accuracy"], abs=0.2)
    again = run(tmp_path, levels=Levels(2, rate=0.6), rewind="1it", controls=controls)
    assert again["levels"] == result["levels"]


def test_barriers_are_measured_where_they_are_asked_for(tmp_path: Path) -> None:
    """Also of levels that are on disk with barriers of another line."""
    shape = {"levels": Levels(1, rate=0.5), "rewind": "1it", "trainer": {"max_epochs": 1}}
    first = run(tmp_path, **shape, controls=Controls(connectivity=Interpolation(3)))
    line = Interpolation(4, ("train", "test"))
    again = run(tmp_path, **shape, controls=Controls(connectivity=line))
    for before, level in zip(first["levels"], again["levels"]):
        assert before["seconds"] == level["seconds"], "kept"
        assert list(before["connectivity"]["orders"]) == ["val"]
        for pair in ("orders", "levels") if level["level"] else ("orders",):
            found = level["connectivity"][pair]
            assert list(found) == ["train", "test"]
            for split, each in found.items():
                assert each["alphas"] == [0, 1 / 3, 2 / 3, 1]
                assert (each["split"], each["metric"]) == (split, f"{split}/accuracy")
        assert set(level["connectivity"]["twin"]) == set(level["metrics"])


def test_barriers_on_data_that_is_not_there_are_refused_before_training(tmp_path: Path) -> None:
    class Untested(lp.LightningDataModule):
        classes = 10

        def train_dataloader(self) -> Any:
            return Digits().train_dataloader()

        val_dataloader = train_dataloader

    controls = Controls(connectivity=Interpolation(split="test"))
    with pytest.raises(ValueError, match="Untested has no test_dataloader: evaluate on another split"):
        hunt(model=MLP(64, [4], 10), data=Untested(), trainer=CPU, levels=1, controls=controls, out=tmp_path)
    assert not (tmp_path / "level_00").exists()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, []),
        ({"mode": "weights"}, ["optimizers"]),
        ({"mode": "learning_rate"}, ["weights", "buffers"]),
        ({"order": "fresh"}, ["random state", "data order"]),
    ],
)
def test_what_was_not_rewound_is_recorded(tmp_path: Path, options: dict[str, Any], left: list[str]) -> None:
    level = run(tmp_path, levels=Levels(1, rate=0.5), rewind=Rewind("3it", **options))["levels"][1]
    assert level["rewind"]["at"] == "point"
    assert level["rewind"]["not rewound"] == left
    assert len(level["rewind"]["rewound"]) == 7 - len(left)


def test_looking_on_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"levels": Levels(1, rate=0.5), "rewind": "3it"}
    one, two = (run(tmp_path / str(on), controls=Controls(diagnose=on), **options) for on in (True, False))
    assert [level["mask_hash"] for level in one["levels"]] == [level["mask_hash"] for level in two["levels"]]
    assert one["history"] == two["history"]


@pytest.mark.parametrize("rewind", ["1ep", "8it", "9it"])
def test_a_rewind_point_at_or_after_the_end_is_refused(tmp_path: Path, rewind: str) -> None:
    """Else every later level would start where it ends, and train nothing."""
    with pytest.raises(ValueError, match="a level trains for 8 steps only"):
        run(tmp_path, None, {"max_epochs": None, "max_steps": 8}, levels=1, rewind=rewind)


def test_a_level_stopped_before_the_rewind_point_is_refused_again_and_again(tmp_path: Path) -> None:
    class StopEarly(lp.Callback):
        def on_train_batch_end(self, trainer: lp.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 4

    for _ in range(2):
        with pytest.raises(ValueError, match="stopped before the rewind point 12it"):
            run(tmp_path, None, {"callbacks": [StopEarly()]}, levels=1, rewind="12it")


@pytest.mark.parametrize(
    ("mode", "scores", "winner"),
    [
        ("max", [0.9, 0.895, 0.7], 1),
        ("min", [0.5, 0.505, 0.9], 1),
        ("min", [0.5, 0.9, 0.1], 2),
        ("max", [None, None, None], None),
        ("max", [0.9, None, None], 0),
    ],
)
def test_the_winner_by_score_and_direction(mode: str, scores: list[float | None], winner: int | None) -> None:
    metrics = [{} if score is None else {"val/x": score} for score in scores]
    levels = [{"monitor": ["x", mode], "metrics": each} for each in metrics]
    assert sparsest_winning(levels, 0.01) == winner


def test_density_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="density is 0"):
        run(tmp_path, density=0.0)


def test_a_family_is_no_subject(tmp_path: Path) -> None:
    """A ticket is one network."""
    mlp = "{class_path: workbench.models.MLP, init_args: {hidden: [4]}}"
    text = f"""
data: {{class_path: workbench.data.Digits, init_args: {{batch_size: 256}}}}
trainer: {{max_steps: 1, accelerator: cpu}}
teacher: {{job: fit, model: {mlp}}}
family: {{job: distill, teacher: teacher, model: {{a: {mlp}, b: {mlp}}}}}
ticket: {{job: hunt, start: START, levels: 1}}
"""
    (tmp_path / "r.yaml").write_text(text.replace("START", "family/a"))
    with pytest.raises(StageError, match="is one of a family: name a stage that trains this network alone"):
        run_recipe(recipes.read(tmp_path / "r.yaml"), tmp_path / "out")
    with pytest.raises(ValueError, match="trained a family, a, b: hunt in one network"):
        hunt(Source(tmp_path / "out" / "family"), levels=1, out=tmp_path / "ticket")
