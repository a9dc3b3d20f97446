"""The records of a run as typed, validated, ordered stages. A missing key is None or empty, never a guess."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.comparison import Comparison, comparison
from workbench.records.fields import clean, listed, mapping, monitored, number, numbers, objects, text, time, truth
from workbench.records.levels import Level, history, levels
from workbench.records.record import read
from workbench.records.sweep import OverSeeds, Run, over_seeds, runs
from workbench.records.verdict import Difference, Verdict, differences, verdicts

LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Export:
    """One file or folder that an export stage wrote."""

    format: str | None
    bytes: float | None
    largest_difference: float | None
    same_predictions: bool | None


@dataclass(frozen=True)
class Member:
    """A network of a stage that trains several."""

    name: str
    metrics: dict[str, float]
    size: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """One stage's record.

    ``parents`` maps a role to the parent's name and fingerprint; ``family`` is the stage that a member's row is of.
    """

    name: str
    job: str | None
    status: str | None
    fingerprint: str | None
    arguments: dict[str, Any]
    seed: int | None
    parents: dict[str, tuple[str, str | None]]
    versions: dict[str, Any]
    environment: dict[str, Any]
    started: datetime | None
    seconds: float | None
    metrics: dict[str, float]
    monitor: tuple[str, str]
    size: dict[str, float]
    history: list[dict[str, float]]
    levels: list[Level]
    exports: list[Export]
    members: list[Member]
    comparison: Comparison | None
    bytes: float | None
    samples: float | None
    verdicts: list[Verdict]
    differences: list[Difference]
    runs: list[Run]
    over_seeds: list[OverSeeds]
    family: str | None = None


def read_run(run: Path, own: Path | None = None) -> list[Stage]:
    """The stages under the folder ``run``, parents first, otherwise by the time they started.

    Args:
        run: A folder that holds one folder per stage.
        own: A stage's folder to leave out: the report that is being written.

    Raises:
        ValueError: If there is no such folder, no record in it, or a malformed one; names the file.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder: give the folder that a recipe was run into")
    skip = None if own is None else own.resolve()
    stages: dict[str, Stage] = {}
    folders: dict[str, Path] = {}
    for folder in sorted(run.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir() or folder.resolve() == skip:
            continue
        path, record = folder / "record.json", _read(folder)
        if record is None:
            continue
        stage = _stage(path, folder.name, record)
        if stage.name in stages:
            raise ValueError(f"{path}: a second stage called {stage.name!r} in this run; move one folder away")
        stages[stage.name], folders[stage.name] = stage, folder
    if not stages:
        raise ValueError(
            f"no record.json in a folder of {run}: run a recipe into it, `lightning run RECIPE --out {run}`"
        )
    judged = covered(stages.values())
    return _ordered({name: _searched(folders[name], each, name in judged) for name, each in stages.items()})


def covered(stages: Iterable[Stage]) -> set[str]:
    """The names of hunts, and of sweeps over hunts, that a finished verdict tells of."""
    told = (stage for stage in stages if stage.verdicts and stage.status == "finished")
    return {name for stage in told for name, _ in stage.parents.values()}


def expand(stages: Iterable[Stage]) -> list[Stage]:
    """The stages, one that trained a family replaced by its members, named stage/member; each has its own arguments."""
    return [made for stage in stages for made in (_members(stage) or [stage])]


def _members(stage: Stage) -> list[Stage]:
    names = {member.name for member in stage.members}

    def own(value: Any, name: str) -> Any:
        return value[name] if isinstance(value, dict) and names <= set(value) else value

    return [
        replace(
            stage,
            name=f"{stage.name}/{member.name}",
            family=stage.name,
            arguments={key: own(value, member.name) for key, value in stage.arguments.items()},
            metrics=member.metrics,
            size=member.size,
            history=member.history,
            members=[],
        )
        for member in stage.members
    ]


def _read(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``, its text cleaned of control characters, or None if there is none."""
    try:
        record = read(folder)
        return None if record is None else clean(record)
    except RecursionError:
        raise ValueError(f"{folder / 'record.json'}: nested too deeply to be a record; move the folder away") from None


def _searched(folder: Path, stage: Stage, judged: bool) -> Stage:
    """The stage; a sweep over hunts that no verdict tells of with the levels of its runs, of their own records."""
    if judged or not stage.runs:
        return stage
    return replace(stage, runs=[replace(run, levels=_levels(folder, run)) for run in stage.runs])


def _levels(folder: Path, run: Run) -> list[Level]:
    if run.folder is None or run.status != "finished":
        return []
    record = _read(folder / run.folder) or {}
    same = run.fingerprint is not None and text(record, "fingerprint") == run.fingerprint
    return levels(folder / run.folder / "record.json", record) if same else []


def _ordered(stages: Mapping[str, Stage]) -> list[Stage]:
    """Earliest first among those whose parents are already placed; times are to the second and may tie."""
    waiting = sorted(stages.values(), key=lambda s: (s.started or LAST, s.name))
    placed: list[Stage] = []
    while waiting:
        names = {s.name for s in waiting}
        ready = (s for s in waiting if not any(_family(p) in names - {s.name} for p, _ in s.parents.values()))
        stage = next(ready, waiting[0])
        waiting.remove(stage)
        placed.append(stage)
    return placed


def _family(name: str) -> str:
    """The stage of ``stage/member``, or the name itself."""
    return name.partition("/")[0]


def _stage(path: Path, folder: str, record: dict[str, Any]) -> Stage:
    """The record at ``path`` as a stage."""
    parents = {
        role: (text(parent, "stage") or "", text(parent, "fingerprint"))
        for role, parent in mapping(path, record, "parents").items()
        if isinstance(parent, dict)
    }
    seed = record.get("seed")
    return Stage(
        name=printable(text(record, "stage") or folder),
        job=text(record, "job"),
        status=text(record, "status"),
        fingerprint=text(record, "fingerprint"),
        arguments=mapping(path, record, "arguments"),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        parents={role: (printable(name), print_) for role, (name, print_) in parents.items() if name},
        versions=mapping(path, record, "versions"),
        environment=mapping(path, record, "environment"),
        started=time(record, "started"),
        seconds=number(record, "seconds"),
        metrics=numbers(mapping(path, record, "metrics")),
        monitor=monitored(path, record),
        size=numbers(mapping(path, record, "size"), finite=True),
        history=history(path, record),
        levels=levels(path, record),
        exports=[_export(export) for export in listed(path, record, "exports")],
        members=[_member(path, name, entry) for name, entry in objects(path, record, "students").items()],
        comparison=comparison(path, mapping(path, record, "comparison")),
        bytes=number(record, "bytes"),
        samples=number(record, "samples"),
        verdicts=verdicts(path, record),
        differences=differences(path, record),
        runs=runs(path, record),
        over_seeds=over_seeds(path, record),
    )


def _member(path: Path, name: str, record: dict[str, Any]) -> Member:
    size = numbers(mapping(path, record, "size"), finite=True)
    return Member(printable(name), numbers(mapping(path, record, "metrics")), size, history(path, record))


def _export(record: dict[str, Any]) -> Export:
    return Export(
        format=text(record, "format"),
        bytes=number(record, "bytes"),
        largest_difference=number(record, "largest_difference"),
        same_predictions=truth(record, "same_predictions"),
    )
