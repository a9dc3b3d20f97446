"""The ``verdict`` job: are the tickets of several hunts tickets, and do they agree with each other?"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from prune.masks import Masks
from prune.tickets.identity import INITIAL, difference
from prune.tickets.judge import ALPHA, judged
from workbench import records
from workbench.checkpoints import compact
from workbench.evaluation.statistics import equivalence, holm, mean, negated, paired
from workbench.records import (
    Equivalence,
    GroupDifference,
    LevelDifference,
    LevelVerdict,
    Overlap,
    Paired,
    Verdict,
    VerdictResult,
)
from workbench.records.source import Source
from workbench.records.verdict import Contrast

DENSE = "dense"
"""The control that is not pruned: it is matched, not beaten."""
TWIN = "twin"
"""The ticket with another data order: the same ticket, not a control."""
SPREAD = 0.1
"""How far densities of one level may be apart: where whole channels are kept, seeds keep larger and smaller ones."""
_DOWN = ("loss", "nll", "perplexity", "ece", "brier", "mse", "mae", "error", "kl")


def verdict(
    hunts: list[Source],
    delta: float = 0.005,
    metric: str | None = None,
    split: Literal["test", "val"] = "test",
    out: Path = Path("runs/verdict"),
) -> dict[str, Any]:
    """Judge whether the tickets of hunts over several seeds match the dense network and beat their controls.

    All comparisons are paired by seed. A level is a `ticket` if it is significantly no more than `delta` below level 0
    and below the control `dense`, if that was trained, and significantly above every other control. It is `no ticket`
    if one of these is significantly false, and otherwise `inconclusive`. The record also has the overlap of the masks
    of different seeds, the overlap expected by chance, and the differences between groups of hunts.

    Args:
        hunts: Hunt stages that differ in their seed only, or sweeps over seeds. A sweep over other settings as well,
            such as two activations, gets one verdict for each of these.
        delta: How far a ticket may be below the dense network, in the unit of the metric, above 0.
        metric: The metric's name without its split, such as `accuracy`; the main metric by default.
        split: The split on which it is measured.
        out: The stage's folder, given by the recipe.

    Returns:
        For the record: `verdicts`, one for each group of hunts, with every level's means, differences and verdict; and
        `differences`, which compare each group's tickets with the first group's: above, below, equivalent within delta,
        or inconclusive.

    Raises:
        ValueError: If a source is no finished hunt, hunts differ in more than their seed, or the metric is missing.
    """
    groups = _grouped(hunts)
    verdicts = [_verdict(name, group, delta, metric, split) for name, group in groups.items()]
    first, *others = groups
    differences = [_difference(name, first, groups, verdicts[0]) for name in others]
    return records.encode(VerdictResult(verdicts, differences))


def _grouped(sources: Sequence[Source]) -> dict[str, dict[Path, dict[str, Any]]]:
    """Folder -> record of every hunt, by what it is beside its seed: sweeps by their other settings."""
    groups: dict[str, dict[Path, dict[str, Any]]] = {}
    for source in sources:
        record = records.finished(Path(source))
        if record is None:
            raise ValueError(f"{source} holds no finished stage: name finished hunts, or a sweep over hunts")
        if "runs" not in record:
            groups.setdefault("", {})[Path(source)] = record
        for run in record.get("runs", ()):
            others = {key: value for key, value in run["over"].items() if key not in records.SEEDS}
            parts = [Path(source).name] if len(sources) > 1 else []
            name = ", ".join([*parts, *(f"{key.rpartition('.')[2]} {value}" for key, value in others.items())])
            folder = Path(source) / run["folder"]
            groups.setdefault(name, {})[folder] = records.finished(folder) or {}
    for found in groups.values():
        for folder, record in found.items():
            if not record.get("levels"):
                raise ValueError(f"{folder} is no finished hunt but of job {record.get('job')!r}: name hunts")
    return groups


def _verdict(
    name: str, hunts: Mapping[Path, Mapping[str, Any]], delta: float, metric: str | None, split: str
) -> Verdict:
    all_levels = [record["levels"] for record in hunts.values()]
    seeds = [record.get("seed") for record in hunts.values()]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"hunts have seeds {seeds}: give hunts of different seeds, each counts as one observation")
    main, mode = all_levels[0][0]["monitor"]
    key = f"{split}/{metric or main}"
    # A metric that is not the main one: the better direction of losses and errors is down.
    sign = 1 if (mode == "max" if metric in (None, main) else not set(_DOWN) & set(re.split(r"[/_]", metric))) else -1
    _check_alike(hunts)
    least, most = min(map(len, all_levels)), max(map(len, all_levels))
    if ended := [folder.name for folder, record in hunts.items() if len(record["levels"]) < most]:
        said = f"only levels up to {least - 1}, which all have, are judged"
        warnings.warn(f"{', '.join(ended)} ended early: {said}", stacklevel=3)
    levels = []
    for each in zip(*all_levels):
        densities = {round(record["density"], 6) for record in each}
        if min(densities) < (1 - SPREAD) * max(densities):
            raise ValueError(f"level {each[0]['level']} has densities {sorted(densities)}: give hunts of one recipe")
        overlap = _overlap([folder / f"level_{each[0]['level']:02d}" for folder in hunts])
        levels.append(replace(_level(each, [first[0] for first in all_levels], key, sign, delta), overlap=overlap))
    return Verdict(
        name=name,
        hunts=[folder.name for folder in hunts],
        fingerprints=[record.get("fingerprint") for record in hunts.values()],
        seeds=seeds,
        metric=key,
        higher_is_better=sign > 0,
        delta=delta,
        levels=levels,
    )


def _check_alike(hunts: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse hunts that differ in more than their seed, as far as their levels tell."""
    first, *others = hunts
    one, *more = (_settings(folder) for folder in hunts)
    for folder, settings in zip(others, more):
        if one and settings and (said := difference(settings, one)):
            raise ValueError(
                f"{folder} was made with {said} as {first} has it: give hunts that differ in their seed only, or a "
                "sweep, which is judged group by group"
            )


def _settings(hunt: Path) -> dict[str, Any]:
    found = (records.read(hunt / "level_00") or {}).get("settings") or {}
    return {name: value for name, value in found.items() if name not in ("seed", INITIAL)}


def _level(
    tickets: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], key: str, sign: int, delta: float
) -> LevelVerdict:
    """One level of all hunts."""
    arms = [arm for arm in tickets[0].get("controls", {}) if all(arm in each.get("controls", {}) for each in tickets)]
    trained = {arm: [each["controls"][arm] for each in tickets] for arm in arms}
    first = tickets[0]["level"] == 0
    against = {} if first else {"level 0": _scores(dense, key, sign)}
    against |= {arm: _scores(rows, key, sign) for arm, rows in trained.items() if arm == DENSE}
    controls = {arm: _scores(rows, key, sign) for arm, rows in trained.items() if arm not in (DENSE, TWIN)}
    ticket = _scores(tickets, key, sign)
    level = judged(ticket, against, controls, delta)
    if first:
        level = replace(level, verdict="dense", why="nothing is pruned")
    steps = {
        arm: [each["best"]["step"] for each in rows if each.get("best")]
        for arm, rows in {"ticket": tickets, **trained}.items()
    }
    best = {arm: mean(values) for arm, values in steps.items() if len(values) == len(tickets)}
    # Judged the higher the better, recorded in the metric's own direction.
    means = {arm: estimate if sign > 0 else negated(estimate) for arm, estimate in level.means.items()}
    number, density = tickets[0]["level"], tickets[0]["density"]
    return replace(level, level=number, density=density, means=means, best_step=best)


def _difference(
    name: str, first: str, groups: Mapping[str, Mapping[Path, Mapping[str, Any]]], judged_first: Verdict
) -> GroupDifference:
    """What the tickets of one group have over those of the first, level by level, within the seeds that both have."""
    group, base = ({each["seed"]: each["levels"] for each in groups[key].values()} for key in (name, first))
    seeds = sorted(group.keys() & base.keys())
    if not seeds:
        raise ValueError(f"{name!r} and {first!r} have no seed in common: give hunts of the same seeds")
    key, sign = judged_first.metric, 1 if judged_first.higher_is_better else -1
    compared: list[tuple[int, Paired, Equivalence]] = []
    for level in range(min(len(levels[seed]) for levels in (group, base) for seed in seeds)):
        rows = [_scores([levels[seed][level] for seed in seeds], key, sign) for levels in (group, base)]
        pairs = [pair for pair in zip(*rows) if all(map(math.isfinite, pair))]
        if pairs:  # else all diverged
            a, b = zip(*pairs)
            compared.append((level, paired(a, b), equivalence(a, b, judged_first.delta)))
    known = {level: pairs.p for level, pairs, _ in compared if pairs.p is not None}
    adjusted = dict(zip(known, holm(list(known.values()))))
    levels = []
    for level, pairs, equal in compared:
        p = adjusted.get(level)
        word: Contrast = "equivalent" if equal.equivalent else "inconclusive"
        if p is not None and p <= ALPHA:
            word = "above" if pairs.mean > 0 else "below"
        density = base[seeds[0]][level]["density"]
        levels.append(LevelDifference(level, density, pairs, equal, p, word))
    return GroupDifference(name, first, seeds, levels)


def _scores(rows: Sequence[Mapping[str, Any]], key: str, sign: int) -> list[float]:
    if any(key not in row["metrics"] for row in rows):
        raise ValueError(f"metric {key!r} is none of {sorted(rows[0]['metrics'])}: choose metric and split from these")
    return [sign * row["metrics"][key] for row in rows]


def _overlap(folders: Sequence[Path]) -> Overlap | None:
    """How far masks of different seeds keep the same weights, as means over pairs; None of a single hunt."""
    masks = [Masks(compact.masks(folder)) for folder in folders]
    pairs = [a.overlap(b) for a, b in combinations(masks, 2)]
    if not pairs:
        return None
    jaccard, chance = (sum(getattr(pair, name) for pair in pairs) / len(pairs) for name in ("jaccard", "chance"))
    return Overlap(jaccard, chance, len(pairs))
