"""What a verdict found, of the record of job ``verdict``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.estimates import Estimate, estimate, estimates
from workbench.records.fields import listed, mapping, number, objects, text, truth, whole


@dataclass(frozen=True)
class Against:
    """What the tickets have over an arm, within seeds; positive is better. ``holds`` is None while it is open."""

    difference: Estimate | None
    p: float | None
    holds: bool | None


@dataclass(frozen=True)
class Judged:
    """One level over seeds.

    Attributes:
        verdict: ``dense``, ``ticket``, ``no ticket`` or ``inconclusive``.
        why: In words.
        means: Arm -> its score.
        matches: Network that was not pruned -> whether the ticket matches it.
        beats: Control -> whether the ticket beats it.
        steps: Arm -> the step at which it was best.
        overlap: Jaccard overlap of masks of different seeds, mean over pairs.
        chance: What chance gives.
    """

    level: int | None
    density: float | None
    verdict: str
    why: str
    means: dict[str, Estimate]
    matches: dict[str, Against]
    beats: dict[str, Against]
    steps: dict[str, Estimate]
    overlap: float | None
    chance: float | None


@dataclass(frozen=True)
class Verdict:
    """A group of hunts that differ in their seed, judged; ``metric`` is its name with its split."""

    name: str
    hunts: list[str]
    fingerprints: list[str | None]
    seeds: list[str]
    metric: str
    mode: str
    delta: float
    levels: list[Judged]


@dataclass(frozen=True)
class Gap:
    """One level of the tickets of a group less those of another; positive is better; ``p`` is adjusted over levels."""

    level: int | None
    density: float | None
    difference: Estimate | None
    p: float | None
    said: str


@dataclass(frozen=True)
class Difference:
    """What the tickets of the group ``of`` have over those of ``less``."""

    of: str
    less: str
    seeds: list[str]
    levels: list[Gap]


def verdicts(path: Path, record: dict[str, Any]) -> list[Verdict]:
    """The entry ``verdicts`` of the record at ``path``.

    Raises:
        ValueError: If it is malformed.
    """
    return [_verdict(path, entry) for entry in listed(path, record, "verdicts")]


def differences(path: Path, record: dict[str, Any]) -> list[Difference]:
    """The entry ``differences`` of the record at ``path``.

    Raises:
        ValueError: If it is malformed.
    """
    return [
        Difference(
            of=text(entry, "of") or "",
            less=text(entry, "less") or "",
            seeds=_texts(entry, "seeds"),
            levels=[
                Gap(
                    level=whole(level, "level"),
                    density=number(level, "density"),
                    difference=estimate(path, mapping(path, level, "paired")),
                    p=number(level, "p_holm"),
                    said=text(level, "said") or "",
                )
                for level in listed(path, entry, "levels")
            ],
        )
        for entry in listed(path, record, "differences")
    ]


def _verdict(path: Path, record: dict[str, Any]) -> Verdict:
    return Verdict(
        name=text(record, "name") or "",
        hunts=_texts(record, "hunts"),
        fingerprints=[text({"": value}, "") for value in _values(record, "fingerprints")],
        seeds=_texts(record, "seeds"),
        metric=text(record, "metric") or "metric",
        mode="min" if record.get("higher_is_better") is False else "max",
        delta=number(record, "delta") or 0.0,
        levels=[_judged(path, entry) for entry in listed(path, record, "levels")],
    )


def _judged(path: Path, record: dict[str, Any]) -> Judged:
    overlap = mapping(path, record, "overlap")
    return Judged(
        level=whole(record, "level"),
        density=number(record, "density"),
        verdict=text(record, "verdict") or "",
        why=text(record, "why") or "",
        means=estimates(path, record, "means"),
        matches=_against(path, record, "matches"),
        beats=_against(path, record, "beats"),
        steps=estimates(path, record, "best_step"),
        overlap=number(overlap, "jaccard"),
        chance=number(overlap, "chance"),
    )


def _against(path: Path, record: dict[str, Any], key: str) -> dict[str, Against]:
    return {
        printable(arm): Against(
            estimate(path, mapping(path, entry, "paired")), number(entry, "p"), truth(entry, "holds")
        )
        for arm, entry in objects(path, record, key).items()
    }


def _texts(record: dict[str, Any], key: str) -> list[str]:
    return [printable(str(value)) for value in _values(record, key)]


def _values(record: dict[str, Any], key: str) -> list[Any]:
    values = record.get(key)
    return values if isinstance(values, list) else []
