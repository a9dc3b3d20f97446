"""What a comparison found, of the record of job ``compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.fields import column, mapping, number, numbers, objects, text


@dataclass(frozen=True)
class Scored:
    """A network in a comparison.

    Attributes:
        name: The stage's, or stage/member.
        scores: Those that are known, by name.
        gain: Its accuracy less the baseline's.
        paired: Of that difference ``low``, ``high``, ``confidence``, ``p`` and ``p_holm``, where known.
        recall: By class, as the comparison lists them.
        gained: By class, the samples that it alone has right; the baseline's are ``lost``.
        lost: See there.
    """

    name: str
    scores: dict[str, float]
    gain: float | None
    paired: dict[str, float]
    recall: list[float | None]
    gained: list[float | None]
    lost: list[float | None]


@dataclass(frozen=True)
class Comparison:
    """What a compare stage found; ``classes`` are names of classes, ``counts`` their samples, ``of`` all there are."""

    split: str
    baseline: str | None
    n: float | None
    unit: str
    method: str | None
    teacher: Scored | None
    students: list[Scored]
    classes: list[str]
    counts: list[float | None]
    of: float | None


def comparison(path: Path, record: dict[str, Any]) -> Comparison | None:
    """The entry ``comparison`` of the record at ``path``; None if it is empty.

    Raises:
        ValueError: If it is malformed.
    """
    if not record:
        return None
    classes = mapping(path, record, "per_class")
    by_class = objects(path, classes, "students")
    students = objects(path, record, "students")
    teacher = mapping(path, record, "teacher")
    named = classes.get("names") or classes.get("classes")
    methods = (text(mapping(path, entry, "paired"), "method") for entry in students.values())
    return Comparison(
        split=text(record, "split") or "test",
        baseline=text(record, "baseline"),
        n=number(record, "n"),
        unit=text(record, "unit") or "samples",
        method=next((method for method in methods if method), None),
        teacher=_scored(path, text(teacher, "name") or "teacher", teacher, {"recall": classes.get("teacher")}),
        students=[_scored(path, printable(name), s, by_class.get(name, {})) for name, s in students.items()],
        classes=[printable(str(name)) for name in named] if isinstance(named, list) else [],
        counts=column(classes, "n"),
        of=number(classes, "of"),
    )


def _scored(path: Path, name: str, record: dict[str, Any], by_class: dict[str, Any]) -> Scored:
    paired = mapping(path, record, "paired")
    scores = numbers(record)
    gain = scores.pop("gain", None)
    paired = {**numbers(paired), **numbers(mapping(path, paired, "interval"))}
    recall, gained, lost = (column(by_class, key) for key in ("recall", "gained", "lost"))
    return Scored(name, scores, gain, paired, recall, gained, lost)
