"""Records of hunts, sweeps and verdicts with synthetic scores."""

import html
import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prune.tickets.judge import LevelScores, judged
from tests.helpers.report_records import level, record
from workbench.evaluation.statistics import equivalence, mean, paired
from workbench.launcher.sweep.summary import over_seeds
from workbench.records import Run, encode
from workbench.records.codec import decode
from workbench.report.job import report

DELTA = 0.003
ARMS = ("reinit", "shuffled")
DENSITIES = [0.8**n for n in range(18)]
FEW = tuple(DENSITIES[::4])


def score(arm: str, density: float, seed: int) -> float:
    """Tickets hold until about 5 % density, controls drop from about 30 %; arms of one seed share an offset."""
    draw = random.Random(f"{arm} {density:.4f} {seed}")
    luck = random.Random(seed).uniform(-0.001, 0.001)
    knee, steep = {"ticket": (0.03, 0.012), "reinit": (0.15, 0.02), "shuffled": (0.12, 0.02)}[arm]
    gained = 0.0015 if arm == "ticket" and 0.05 < density < 0.7 else 0.0
    return 0.978 + luck + gained - steep * max(0.0, knee / density - 1) ** 0.7 + draw.uniform(-0.0004, 0.0004)


def hunt_record(seed: int, densities=tuple(DENSITIES), controls=ARMS, lift=0.0) -> dict[str, Any]:
    """The record of a hunt with controls and everything that is measured of a level."""
    levels = []
    for number, density in enumerate(densities):
        entry = level(number, density, score("ticket", density, seed) + lift * number)
        steps = {arm: {"step": 4000 - 100 * number + 30 * seed + 400 * (arm != "ticket")} for arm in ("ticket", *ARMS)}
        entry |= {"best": steps["ticket"], "arm": "ticket"}
        units = {"units": 400, "dead": 4 * number, "zero": number, "gradient_flow": 0.01 * 1.1**number}
        entry["diagnosis"] = {**units, "gradient_ratio": 1.0}
        entry["mask_distances"] = [0.2, 0.05 / (1 + number)]
        barrier = {"barrier": 0.001 * number, "excess": 0.0, "stable": number < 10, "ends": [0.02, 0.02]}
        levels_apart = {"levels": {"val": {**barrier, "barrier": 0.004}}} if number else {}
        entry["connectivity"] = {"orders": {"val": barrier}, **levels_apart}
        if number:
            entry["controls"] = {
                arm: {"metrics": scores(score(arm, density, seed)), "best": steps[arm], "arm": arm} for arm in controls
            }
        levels.append(entry)
    last = {name: levels[-1][name] for name in ("metrics", "size")}
    return record(f"seed-{seed}", "hunt", 10 * seed, levels=levels, **{**last, "seed": seed, "seconds": 600.0 + seed})


def scores(test: float) -> dict[str, float]:
    return {"test/accuracy": test, "val/accuracy": test}


def sweep_record(hunts: list[dict[str, Any]], name="hunts", over=lambda hunt: {"seed": hunt["seed"]}) -> dict[str, Any]:
    """The record of a sweep whose runs are these."""
    runs = [
        {
            "name": hunt["stage"],
            "folder": hunt["stage"],
            "over": over(hunt),
            "fingerprint": hunt["fingerprint"],
            "attempts": 1,
            "status": "finished",
            **{key: hunt[key] for key in ("seconds", "metrics", "monitor")},
        }
        for hunt in hunts
    ]
    entry = record(
        name,
        "sweep",
        0,
        runs=runs,
        summary=encode(over_seeds([decode(Run, run, Path()) for run in runs])),
        seed=None,
        seconds=1900.0,
    )
    del entry["monitor"]
    return entry


def verdict_record(groups: dict[str, list[dict[str, Any]]], name="tickets", of=("hunts",), start=500) -> dict[str, Any]:
    """The record of a verdict on groups of hunts, as the job makes it."""
    verdicts = [verdict(group, hunts) for group, hunts in groups.items()]
    first, *others = groups
    differences = [difference(group, first, groups[group], groups[first]) for group in others]
    parents = [(f"hunts[{place}]", stage) for place, stage in enumerate(of)]
    told = {"verdicts": verdicts, "differences": differences, "seconds": 0.4, "seed": None}
    entry = record(name, "verdict", start, parents, **told)
    del entry["monitor"]
    return entry


def verdict(name: str, hunts: list[dict[str, Any]]) -> dict[str, Any]:
    every = list(zip(*(hunt["levels"] for hunt in hunts)))
    dense = [entry["metrics"]["test/accuracy"] for entry in every[0]]
    arms = [list(each[0].get("controls", {})) for each in every]
    scores = [
        LevelScores(
            [entry["metrics"]["test/accuracy"] for entry in each],
            {"level 0": dense},
            {arm: [e["controls"][arm]["metrics"]["test/accuracy"] for e in each] for arm in names},
            each[0]["level"],
        )
        for each, names in zip(every, arms)
    ]
    first = replace(judged([scores[:1]], DELTA)[0][0], verdict="dense", why="nothing is pruned", matches={})
    levels = []
    for each, names, found in zip(every, arms, [first, *judged([scores[1:]], DELTA)[0]]):
        steps = {arm: [e["controls"][arm]["best"]["step"] for e in each] for arm in names}
        steps = {"ticket": [e["best"]["step"] for e in each], **steps}
        number = each[0]["level"]
        levels.append(
            {
                **encode(found),
                "level": number,
                "density": each[0]["density"],
                "best_step": {arm: asdict(mean(values)) for arm, values in steps.items()},
                "overlap": {"jaccard": 0.9**number, "chance": 0.8**number, "pairs": 3} if len(hunts) > 1 else None,
            }
        )
    family = {"correction": "holm", "alpha": 0.05, "groups": 1, "levels": [each[0]["level"] for each in every[1:]]}
    return {
        "name": name,
        "hunts": [hunt["stage"] for hunt in hunts],
        "fingerprints": [hunt["fingerprint"] for hunt in hunts],
        "seeds": [hunt["seed"] for hunt in hunts],
        "metric": "test/accuracy",
        "higher_is_better": True,
        "delta": DELTA,
        "levels": levels,
        "family": family,
    }


def difference(of: str, less: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    levels = []
    for a, b in zip(zip(*(h["levels"] for h in ours)), zip(*(h["levels"] for h in theirs))):
        x, y = ([entry["metrics"]["test/accuracy"] for entry in each] for each in (a, b))
        told = {"paired": asdict(paired(x, y)), "equivalence": asdict(equivalence(x, y, DELTA))}
        p, p_equivalent = told["paired"]["p"], told["equivalence"]["p"]
        word = "inconclusive" if p is None or p > 0.05 else "above" if told["paired"]["mean"] > 0 else "below"
        word = "equivalent" if word == "inconclusive" and told["equivalence"]["equivalent"] else word
        told |= {"p_adjusted": p, "p_equivalent": p_equivalent, "verdict": word}
        levels.append({"level": a[0]["level"], "density": a[0]["density"], **told})
    seeds = [hunt["seed"] for hunt in ours]
    return {"of": of, "less": less, "seeds": seeds, "levels": levels, "comparisons": len(levels)}


def write_records(run: Path, *entries: dict[str, Any], runs: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """The records on disk, each in its stage's folder, and those of a sweep's runs in its."""
    placed = [(run / entry["stage"], entry) for entry in entries]
    placed += [(run / sweep / entry["stage"], entry) for sweep, found in (runs or {}).items() for entry in found]
    for folder, entry in placed:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").write_text(json.dumps(entry), encoding="utf-8")
    return run


def lottery(run: Path) -> tuple[Path, dict[str, Any]]:
    """A run of one sweep and its verdict, and the verdict's record."""
    hunts = [hunt_record(seed, FEW) for seed in range(3)]
    entry = verdict_record({"": hunts})
    return write_records(run, sweep_record(hunts), entry, runs={"hunts": hunts}), entry


def page_of(run: Path) -> str:
    """The run's page."""
    report(run / "report")
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """The text of a page, without markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).replace("\xa0", " ").split())


def grouped(run: Path) -> tuple[Path, dict[str, Any]]:
    """The same of two sweeps, whose tickets are compared."""
    labels = [hunt_record(seed, FEW, controls=()) for seed in range(4)]
    taught = [hunt_record(seed, FEW, controls=(), lift=0.001 + 0.0001 * seed) for seed in range(4)]
    entry = verdict_record({"labels": labels, "taught": taught}, of=("labels", "taught"))
    stages = sweep_record(labels, "labels"), sweep_record(taught, "taught"), entry
    return write_records(run, *stages, runs={"labels": labels, "taught": taught}), entry
