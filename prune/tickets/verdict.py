"""The ``verdict`` job: are the tickets of several hunts tickets, and do they agree with each other?"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from prune.masks import Masks
from prune.tickets.identity import INITIAL, difference
from prune.tickets.judge import ALPHA, Correction, LevelScores, judged
from workbench import records
from workbench.checkpoints import compact
from workbench.evaluation.statistics import equivalence, holm_exclusive, mean, negated, paired
from workbench.records import (
    Equivalence,
    Family,
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
    levels: list[int] | None = None,
    correction: Correction = "holm",
    out: Path = Path("runs/verdict"),
) -> dict[str, Any]:
    """Judge whether the tickets of hunts over several seeds match the dense network and beat their controls.

    All comparisons are paired by seed. A level is a `ticket` if it is significantly less than `delta` below level 0
    and below the control `dense`, if that was trained, and significantly above every other control. It is `no ticket`
    if it is significantly more than `delta` below the former or below one of the latter, and otherwise `inconclusive`.
    The record also has the overlap of the masks of different seeds, the overlap expected by chance, and the
    differences between groups of hunts.

    All levels of all groups are one family: the chance that any is falsely called a ticket is at most 5 %.

    Args:
        hunts: Hunt stages that differ in their seed only, or sweeps over seeds. A sweep over other settings as well,
            such as two activations, gets one verdict for each of these.
        delta: How far a ticket may be below the dense network, in the unit of the metric, above 0.
        metric: The metric's name without its split, such as `accuracy`; the main metric by default.
        split: The split on which it is measured.
        levels: The levels to judge, chosen before their scores are seen; by default all that every hunt has.
        correction: For their number: `holm` tests all of them, each more strictly; `sequence` tests from dense to
            sparse until the first level that is not shown to be a ticket, for hunts whose first level beats its
            controls.
        out: The stage's folder, given by the recipe.

    Returns:
        For the record: `verdicts`, one for each group of hunts, with every level's means, differences and verdict; and
        `differences`, which compare each group's tickets with the first group's: above, below, equivalent within delta,
        or inconclusive.

    Raises:
        ValueError: If a source is no finished hunt, hunts differ in more than their seed, or the metric or a level is
            missing.
    """
    groups = _grouped(hunts)
    read = [_Group.read(name, group, metric, split, levels) for name, group in groups.items()]
    results = judged([group.scores for group in read], delta, correction)
    verdicts = [group.verdict(found, delta, correction, len(read)) for group, found in zip(read, results)]
    return records.encode(VerdictResult(verdicts, _differences(groups, verdicts[0], levels)))


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


@dataclass(frozen=True)
class _Group:
    """Hunts that differ in their seed.

    Args:
        name: What they have in common.
        hunts: Folder -> record.
        key: The metric that is compared, with its split.
        sign: 1 where higher is better, else -1.
        rows: Of every level that all have, its record in each hunt.
        judged: Numbers of the levels to judge.
    """

    name: str
    hunts: Mapping[Path, Mapping[str, Any]]
    key: str
    sign: int
    rows: Sequence[tuple[Mapping[str, Any], ...]]
    judged: Sequence[int]

    @classmethod
    def read(
        cls,
        name: str,
        hunts: Mapping[Path, Mapping[str, Any]],
        metric: str | None,
        split: str,
        levels: Sequence[int] | None,
    ) -> "_Group":
        """Hunts on disk, checked."""
        every = [record["levels"] for record in hunts.values()]
        seeds = [record.get("seed") for record in hunts.values()]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"hunts have seeds {seeds}: give hunts of different seeds, each counts as one observation")
        main, mode = every[0][0]["monitor"]
        # A metric that is not the main one: the better direction of losses and errors is down.
        up = mode == "max" if metric in (None, main) else not set(_DOWN) & set(re.split(r"[/_]", metric))
        _check_alike(hunts)
        least, most = min(map(len, every)), max(map(len, every))
        if ended := [folder.name for folder, record in hunts.items() if len(record["levels"]) < most]:
            said = f"only levels up to {least - 1}, which all have, are judged"
            warnings.warn(f"{', '.join(ended)} ended early: {said}", stacklevel=3)
        rows = list(zip(*every))
        for each in rows:
            densities = {round(record["density"], 6) for record in each}
            if min(densities) < (1 - SPREAD) * max(densities):
                raise ValueError(
                    f"level {each[0]['level']} has densities {sorted(densities)}: give hunts of one recipe"
                )
        there = [each[0]["level"] for each in rows[1:]]
        if missing := [level for level in levels or () if level not in there]:
            raise ValueError(f"levels has {missing[0]}: all hunts have levels {there[0]} to {there[-1]} beyond level 0")
        chosen = [level for level in there if levels is None or level in levels]
        return cls(name, hunts, f"{split}/{metric or main}", 1 if up else -1, rows, chosen)

    @property
    def scores(self) -> list[LevelScores]:
        """Of the levels to judge."""
        return [self._scores(each) for each in self.rows if each[0]["level"] in self.judged]

    def verdict(self, found: Sequence[LevelVerdict], delta: float, correction: Correction, groups: int) -> Verdict:
        """The levels that were judged, with everything else that is known of them, and the others."""
        verdicts = dict(zip(self.judged, found))
        return Verdict(
            name=self.name,
            hunts=[folder.name for folder in self.hunts],
            fingerprints=[record.get("fingerprint") for record in self.hunts.values()],
            seeds=[record.get("seed") for record in self.hunts.values()],
            metric=self.key,
            higher_is_better=self.sign > 0,
            delta=delta,
            levels=[self._level(each, verdicts.get(each[0]["level"])) for each in self.rows],
            family=Family(correction, ALPHA, groups, list(self.judged)),
        )

    def _scores(self, tickets: Sequence[Mapping[str, Any]]) -> LevelScores:
        """Of one level in all hunts: level 0 and the control ``dense`` are matched, other controls beaten."""
        trained = _controls(tickets)
        dense = {"level 0": _scores(self.rows[0], self.key, self.sign)} if tickets[0]["level"] else {}
        dense |= {arm: _scores(rows, self.key, self.sign) for arm, rows in trained.items() if arm == DENSE}
        controls = {
            arm: _scores(rows, self.key, self.sign) for arm, rows in trained.items() if arm not in (DENSE, TWIN)
        }
        return LevelScores(_scores(tickets, self.key, self.sign), dense, controls, tickets[0]["level"])

    def _level(self, tickets: Sequence[Mapping[str, Any]], level: LevelVerdict | None) -> LevelVerdict:
        """One level in all hunts; ``level`` is what was judged, None if it was not."""
        number, density = tickets[0]["level"], tickets[0]["density"]
        if level is None:
            scores = {arm: list(filter(math.isfinite, values)) for arm, values in self._scores(tickets).arms.items()}
            known = {arm: mean(values) for arm, values in scores.items() if values}
            word, why = ("dense", "nothing is pruned") if number == 0 else ("inconclusive", "not chosen to be judged")
            level = LevelVerdict(None, None, word, why, known, {}, {})
        steps = {
            arm: [each["best"]["step"] for each in rows if each.get("best")]
            for arm, rows in {"ticket": tickets, **_controls(tickets)}.items()
        }
        best = {arm: mean(values) for arm, values in steps.items() if len(values) == len(tickets)}
        # Judged the higher the better, recorded in the metric's own direction.
        means = {arm: estimate if self.sign > 0 else negated(estimate) for arm, estimate in level.means.items()}
        overlap = _overlap([folder / f"level_{number:02d}" for folder in self.hunts])
        whole = tickets[0].get("model_density")
        return replace(
            level, level=number, density=density, model_density=whole, means=means, best_step=best, overlap=overlap
        )


def _controls(tickets: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Control -> its records, of those that were trained beside all of these tickets."""
    arms = [arm for arm in tickets[0].get("controls", {}) if all(arm in each.get("controls", {}) for each in tickets)]
    return {arm: [each["controls"][arm] for each in tickets] for arm in arms}


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


def _differences(
    groups: Mapping[str, Mapping[Path, Mapping[str, Any]]], judged_first: Verdict, levels: Sequence[int] | None
) -> list[GroupDifference]:
    """What the tickets of every other group have over those of the first, level by level, within seeds.

    At each level two questions are asked, of which one answer at most can be wrong: do they differ, and are they within
    delta of each other. All levels of all groups are one family.
    """
    first, *others = groups
    compared = [_compared(name, first, groups, judged_first, levels) for name in others]
    flat = [(pairs.p, equal.p) for _, levels in compared for *_, pairs, equal in levels]
    adjusted = iter(holm_exclusive(flat))
    return [
        GroupDifference(
            name,
            first,
            seeds,
            [_difference(*each, *next(adjusted)) for each in levels],
            len(flat),
        )
        for name, (seeds, levels) in zip(others, compared)
    ]


def _compared(
    name: str,
    first: str,
    groups: Mapping[str, Mapping[Path, Mapping[str, Any]]],
    judged_first: Verdict,
    chosen: Sequence[int] | None,
) -> tuple[list[Any], list[tuple[int, tuple[float, float | None], Paired, Equivalence]]]:
    """The seeds that two groups share; and of every level that both have, or is chosen, its density and differences."""
    group, base = ({each["seed"]: each["levels"] for each in groups[key].values()} for key in (name, first))
    seeds = sorted(group.keys() & base.keys())
    if not seeds:
        raise ValueError(f"{name!r} and {first!r} have no seed in common: give hunts of the same seeds")
    key, sign = judged_first.metric, 1 if judged_first.higher_is_better else -1
    compared: list[tuple[int, tuple[float, float | None], Paired, Equivalence]] = []
    for level in range(min(len(levels[seed]) for levels in (group, base) for seed in seeds)):
        if chosen is not None and level not in chosen:
            continue
        rows = [_scores([levels[seed][level] for seed in seeds], key, sign) for levels in (group, base)]
        pairs = [pair for pair in zip(*rows) if all(map(math.isfinite, pair))]
        if pairs:  # else all diverged
            a, b = zip(*pairs)
            record = base[seeds[0]][level]
            densities = (record["density"], record.get("model_density"))
            compared.append((level, densities, paired(a, b), equivalence(a, b, judged_first.delta)))
    return seeds, compared


def _difference(
    level: int,
    densities: tuple[float, float | None],
    pairs: Paired,
    equal: Equivalence,
    p: float | None,
    p_equivalent: float | None,
) -> LevelDifference:
    """One level; p values are adjusted."""
    word: Contrast = "equivalent" if p_equivalent is not None and p_equivalent <= ALPHA else "inconclusive"
    if p is not None and p <= ALPHA:
        word = "above" if pairs.mean > 0 else "below"
    return LevelDifference(level, densities[0], pairs, equal, p, p_equivalent, word, densities[1])


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
