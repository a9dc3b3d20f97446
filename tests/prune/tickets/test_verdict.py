"""The verdict over hunts on disk: arms paired by seed, levels of one density, masks of seeds compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prune.masks import Masks
from prune.tickets.verdict import verdict
from workbench import records
from workbench.checkpoints import compact
from workbench.models import MLP
from workbench.records.source import Source

LEVELS = (1.0, 0.5, 0.25)
ARMS = ("ticket", "reinit", "shuffled")


def hunt(folder: Path, seed: int, metric: str = "accuracy", mode: str = "max", **change: Any) -> Source:
    """A hunt as it is on disk, of made-up scores: tickets hold, controls fall by a tenth a level."""
    draw = torch.Generator().manual_seed(seed)
    wobble = torch.rand(16, generator=draw, dtype=torch.float64).sub(0.5).mul(0.002).tolist()
    sign = 1 if mode == "max" else -1
    levels = []
    for level, density in enumerate(LEVELS):

        def row(score: float, arm: str = "ticket", level: int = level, density: float = density) -> dict[str, Any]:
            score = sign * (score + wobble[4 * level + ARMS.index(arm)])
            metrics = {f"val/{metric}": score, f"test/{metric}": score}
            return {"metrics": metrics, "monitor": [metric, mode], "level": level, "density": density, "arm": arm}

        network = MLP(16, [8], 4)
        masks = Masks({"layers.0.weight": torch.rand(8, 16, generator=draw) < density} if level else full(network))
        masks.apply(network)
        compact.save(network, folder / f"level_{level:02d}" / "compact", masks)
        ticket = {**row(0.95), "best": {"step": 100 + seed, "score": 0.1}}
        controls = {arm: row(0.95 - 0.1 * level, arm) for arm in ("reinit", "shuffled")} if level else {}
        levels.append({**ticket, **({"controls": controls} if controls else {})})
    record = {"stage": folder.name, "job": "hunt", "status": "finished", "fingerprint": "f", "seed": seed}
    records.write(folder, {**record, "levels": levels, **change})
    return Source(folder)


def full(network: nn.Module) -> dict[str, torch.Tensor]:
    return {"layers.0.weight": torch.ones_like(network.get_parameter("layers.0.weight"), dtype=torch.bool)}


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), ("nll", "min")])
def test_hunts_of_several_seeds_are_judged_level_by_level(tmp_path: Path, metric: str, mode: str) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed, metric, mode) for seed in range(4)]
    (found,) = verdict(hunts)["verdicts"]
    assert [level["verdict"] for level in found["levels"]] == ["dense", "ticket", "ticket"]
    assert found["seeds"] == [0, 1, 2, 3]
    last = found["levels"][-1]
    sign = 1 if mode == "max" else -1
    assert last["means"]["ticket"]["mean"] == pytest.approx(sign * 0.95, abs=0.002)
    interval = last["means"]["reinit"]["interval"]
    assert interval["low"] < last["means"]["reinit"]["mean"] < interval["high"]
    assert last["beats"]["reinit"]["paired"]["mean"] == pytest.approx(0.2, abs=0.002)
    assert last["best_step"]["ticket"]["mean"] == 101.5


def test_masks_of_seeds_overlap_as_chance_has_it(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    (found,) = verdict(hunts)["verdicts"]
    assert found["levels"][0]["overlap"] == {"jaccard": 1.0, "chance": 1.0, "pairs": 3}
    overlap = found["levels"][2]["overlap"]
    assert overlap["chance"] == pytest.approx(1 / 7, abs=0.05)
    assert overlap["jaccard"] == pytest.approx(overlap["chance"], abs=0.1)


def test_a_sweep_has_a_verdict_for_each_of_its_other_settings(tmp_path: Path) -> None:
    runs = []
    for activation in ("relu", "gelu"):
        for seed in (0, 1, 2):
            hunt(tmp_path / "grid" / f"{activation}-{seed}", seed)
            over = {"model.init_args.activation": activation, "seed": seed}
            runs.append({"name": f"{activation}-{seed}", "folder": f"{activation}-{seed}", "over": over})
    records.write(tmp_path / "grid", {"job": "sweep", "status": "finished", "runs": runs})
    found = verdict([Source(tmp_path / "grid")])["verdicts"]
    assert [each["name"] for each in found] == ["activation relu", "activation gelu"]
    assert [len(each["hunts"]) for each in found] == [3, 3]


def test_groups_are_compared_with_the_first_within_seeds(tmp_path: Path) -> None:
    for group, lift in (("labels", 0.0), ("taught", 0.05)):
        runs = []
        for seed in (0, 1, 2, 3):
            folder = tmp_path / group / f"seed-{seed}"
            hunt(folder, seed)
            record = records.read(folder) or {}
            for level in record["levels"][1:]:
                level["metrics"]["test/accuracy"] += lift * level["level"] + 1e-4 * seed
            records.write(folder, record)
            runs.append({"name": folder.name, "folder": folder.name, "over": {"seed": seed}})
        records.write(tmp_path / group, {"job": "sweep", "status": "finished", "runs": runs})
        for run in runs if lift else ():  # the difference of the seeds must differ a little, or it has no spread
            record = records.read(tmp_path / group / run["folder"]) or {}
            for level in record["levels"][1:]:
                level["metrics"]["test/accuracy"] += 1e-4 * (run["over"]["seed"] % 2)
            records.write(tmp_path / group / run["folder"], record)
    record = records.read(tmp_path / "taught" / "seed-3") or {}
    record["levels"][2]["metrics"]["test/accuracy"] = float("nan")
    records.write(tmp_path / "taught" / "seed-3", record)
    found = verdict([Source(tmp_path / "labels"), Source(tmp_path / "taught")])
    assert [each["name"] for each in found["verdicts"]] == ["labels", "taught"]
    (difference,) = found["differences"]
    assert (difference["of"], difference["less"], difference["seeds"]) == ("taught", "labels", [0, 1, 2, 3])
    assert [level["verdict"] for level in difference["levels"]] == ["inconclusive", "above", "above"]
    assert difference["levels"][2]["paired"]["mean"] == pytest.approx(0.1, abs=1e-3)
    assert [level["paired"]["n"] for level in difference["levels"]] == [4, 4, 3], "one diverged"
    assert found["verdicts"][1]["levels"][2]["verdict"] == "no ticket"


def rescored(source: Source, arm: str, scores: dict[int, float]) -> None:
    """The hunt on disk with other test accuracies of an arm, by level."""
    record = records.read(Path(source)) or {}
    for level, score in scores.items():
        row = record["levels"][level]
        (row if arm == "ticket" else row["controls"][arm])["metrics"]["test/accuracy"] = score
    records.write(Path(source), record)


def test_all_levels_of_all_groups_are_one_family(tmp_path: Path) -> None:
    for group in ("a", "b"):
        runs = []
        for seed in range(4):
            source = hunt(tmp_path / group / f"seed-{seed}", seed)
            if group == "b":
                rescored(source, "reinit", {1: 0.95 + 0.001 * seed})
            runs.append({"name": f"seed-{seed}", "folder": f"seed-{seed}", "over": {"seed": seed}})
        records.write(tmp_path / group, {"job": "sweep", "status": "finished", "runs": runs})
    sources = [Source(tmp_path / group) for group in ("a", "b")]
    first, second = verdict(sources, correction="sequence")["verdicts"]
    assert first["family"] == {"correction": "sequence", "alpha": 0.05, "groups": 2, "levels": [1, 2]}
    assert [level.get("alpha") for level in first["levels"]] == [None, 0.025, 0.025]
    assert [level.get("alpha") for level in second["levels"]] == [None, 0.05, None], "the first left it its share"
    assert [level["verdict"] for level in second["levels"]] == ["dense", "inconclusive", "inconclusive"]
    assert second["levels"][1]["decided_by"] == ["reinit"]
    every = verdict(sources)["verdicts"][1]
    assert every["family"] == {"correction": "holm", "alpha": 0.05, "groups": 2, "levels": [1, 2]}
    assert [level["verdict"] for level in every["levels"]] == ["dense", "inconclusive", "ticket"]
    (difference,) = verdict(sources)["differences"]
    assert difference["comparisons"] == 3


def test_levels_are_chosen_beforehand(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(4)]
    for seed, source in enumerate(hunts):
        rescored(source, "reinit", {1: 0.95 + 0.001 * seed})
    (found,) = verdict(hunts)["verdicts"]
    assert [level.get("alpha") for level in found["levels"]] == [None, 0.05, 0.025]
    (found,) = verdict(hunts, levels=[2])["verdicts"]
    assert found["levels"][2]["alpha"] == 0.05
    assert [level["verdict"] for level in found["levels"]] == ["dense", "inconclusive", "ticket"]
    assert found["levels"][1]["why"] == "not chosen to be judged"
    assert found["levels"][1]["means"]["reinit"]["n"] == 4
    with pytest.raises(ValueError, match="levels has 3: all hunts have levels 1 to 2 beyond level 0"):
        verdict(hunts, levels=[2, 3])


def test_a_dense_network_that_diverged_is_named(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    for source in hunts:
        rescored(source, "ticket", {0: float("nan")})
    (found,) = verdict(hunts)["verdicts"]
    assert {level["why"] for level in found["levels"][1:]} == {
        "level 0 diverged in every seed: there is no dense network to match"
    }
    assert found["levels"][0]["means"] == {}


def test_mistakes_are_named(tmp_path: Path) -> None:
    first = hunt(tmp_path / "a", 0)
    with pytest.raises(ValueError, match="hunts of different seeds"):
        verdict([first, hunt(tmp_path / "b", 0)])
    with pytest.raises(ValueError, match=r"metric 'test/f1' is none of \['test/accuracy', 'val/accuracy'\]"):
        verdict([first], metric="f1")
    with pytest.raises(ValueError, match="holds no finished stage"):
        verdict([Source(tmp_path / "none")])
    records.write(tmp_path / "fit", {"job": "fit", "status": "finished"})
    with pytest.raises(ValueError, match="is no finished hunt but of job 'fit'"):
        verdict([Source(tmp_path / "fit")])
    other = hunt(tmp_path / "c", 1)
    record = records.read(Path(other)) or {}
    record["levels"][1]["density"] = 0.4
    records.write(Path(other), record)
    with pytest.raises(ValueError, match=r"level 1 has densities \[0.4, 0.5\]"):
        verdict([first, other])


def test_hunts_of_other_settings_are_no_seeds_of_one_recipe(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for source, rate in zip(hunts, (0.2, 0.5)):
        settings = {"rate": rate, "seed": rate, "initial weights": str(source)}
        records.write(Path(source) / "level_00", {"status": "finished", "settings": settings})
    with pytest.raises(ValueError, match=r"b was made with rate 0.5 instead of 0.2 as .*a has it"):
        verdict(hunts)
    records.write(Path(hunts[1]) / "level_00", {"status": "finished", "settings": {"rate": 0.2, "seed": 9}})
    assert verdict(hunts)["verdicts"][0]["seeds"] == [0, 1]


def test_levels_that_a_hunt_did_not_reach_are_told_of(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    record = records.read(Path(hunts[1])) or {}
    records.write(Path(hunts[1]), {**record, "levels": record["levels"][:2]})
    with pytest.warns(UserWarning, match="seed1 ended early: only levels up to 1, which all have, are judged"):
        found = verdict(hunts)["verdicts"]
    assert len(found[0]["levels"]) == 2


def test_whole_channels_leave_densities_a_little_apart(tmp_path: Path) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(2)]
    record = records.read(Path(hunts[1])) or {}
    record["levels"][1]["density"] = 0.48
    records.write(Path(hunts[1]), record)
    assert len(verdict(hunts)["verdicts"][0]["levels"]) == 3


@pytest.mark.parametrize(("metric", "higher"), [("mae", False), ("r2", True), ("loss", False), ("top5_accuracy", True)])
def test_errors_are_better_low(tmp_path: Path, metric: str, higher: bool) -> None:
    hunts = [hunt(tmp_path / f"seed{seed}", seed) for seed in range(2)]
    for source in hunts:
        record = records.read(Path(source)) or {}
        for level in record["levels"]:
            for row in (level, *level.get("controls", {}).values()):
                row["metrics"][f"test/{metric}"] = row["metrics"]["test/accuracy"]
        records.write(Path(source), record)
    assert verdict(hunts, metric=metric)["verdicts"][0]["higher_is_better"] is higher
