"""The records of a run as typed, validated, ordered stages. A missing key is None or empty, never a guess."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.messages import printable
from workbench.records.codec import as_object, clean, decode, number, text
from workbench.records.network import FitResult, Network
from workbench.records.record import read
from workbench.records.schemas import schema

_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Stage(Network):
    """One stage's record: what every job may record, and in ``result`` what its own job does.

    Attributes:
        name: Of the stage.
        job: Of its job.
        status: ``running``, ``finished`` or ``failed``.
        fingerprint: SHA-256 of job, arguments and parents.
        arguments: Those it was run with, defaults too.
        seed: Of everything random.
        parents: Role -> the parent's name and fingerprint.
        versions: Of Python and packages.
        environment: The machine.
        started: When.
        seconds: Of its trainings, also in earlier sessions; of a job that trains nothing, that it took.
        took: Seconds of the session that finished it, as its line in the terminal has them.
        folder: Where its record is.
        result: An object of the dataclass that its job states; None if it states none.
        family: Of a member of a family, the stage that trained it.
    """

    name: str = ""
    job: str | None = None
    status: str | None = None
    fingerprint: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    parents: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    seconds: float | None = None
    took: float | None = None
    folder: Path = Path()
    result: Any = None
    family: str | None = None

    @property
    def spent(self) -> float | None:
        """Seconds that the stage took; of a record that has only those of its trainings, these."""
        return self.seconds if self.took is None else self.took

    @property
    def finished(self) -> bool:
        """Whether its record is whole."""
        return self.status == "finished"


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
    for folder in sorted(run.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir() or folder.resolve() == skip:
            continue
        if (stage := read_stage(folder)) is None:
            continue
        if stage.name in stages:
            path = folder / "record.json"
            raise ValueError(f"{path}: a second stage called {stage.name!r} in this run; move one folder away")
        stages[stage.name] = stage
    if not stages:
        raise ValueError(
            f"no record.json in a folder of {run}: run a recipe into it, `lightning run RECIPE --out {run}`"
        )
    return _ordered(stages)


def read_stage(folder: Path) -> Stage | None:
    """The record in ``folder`` as a stage; None if there is none.

    Raises:
        ValueError: If it is malformed; names the file.
    """
    path = folder / "record.json"
    try:
        raw = read(folder)
        record = None if raw is None else clean(raw)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a record; move the folder away") from None
    return None if record is None else _stage(path, record)


def expand(stages: Iterable[Stage]) -> list[Stage]:
    """The stages, one that trained a family replaced by its members, named stage/member; each has its own arguments."""
    return [member for stage in stages for member in (_members(stage) or [stage])]


def _members(stage: Stage) -> list[Stage]:
    students = stage.result.students if isinstance(stage.result, FitResult) else {}
    names = set(students)

    def of_member(value: Any, name: str) -> Any:
        return value[name] if isinstance(value, dict) and names <= set(value) else value

    return [
        replace(
            stage,
            name=f"{stage.name}/{name}",
            family=stage.name,
            arguments={key: of_member(value, name) for key, value in stage.arguments.items()},
            metrics=student.metrics,
            size=student.size,
            history=student.history,
            result=None,
        )
        for name, student in students.items()
    ]


def _ordered(stages: Mapping[str, Stage]) -> list[Stage]:
    """Earliest first among those whose parents are already placed; times are to the second and may tie."""
    waiting = sorted(stages.values(), key=lambda s: (s.started or _LAST, s.name))
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


def _stage(path: Path, record: dict[str, Any]) -> Stage:
    """The record at ``path`` as a stage."""
    job, seed = text(record.get("job")), record.get("seed")
    network, kind = decode(Network, record, path), schema(job)
    assert network is not None, "nothing that a network cannot be without"
    return Stage(
        **vars(network),
        name=text(record.get("stage")) or printable(path.parent.name),
        job=job,
        status=text(record.get("status")),
        fingerprint=text(record.get("fingerprint")),
        arguments=as_object(record.get("arguments"), path, "arguments"),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        parents={
            role: (name, text(parent.get("fingerprint")))
            for role, parent in as_object(record.get("parents"), path, "parents").items()
            if isinstance(parent, dict) and (name := text(parent.get("stage")))
        },
        versions=as_object(record.get("versions"), path, "versions"),
        environment=as_object(record.get("environment"), path, "environment"),
        started=_time(record.get("started")),
        seconds=number(record.get("seconds")),
        took=number(record.get("took")),
        folder=path.parent,
        result=None if kind is None else decode(kind, record, path),
    )


def _time(value: Any) -> datetime | None:
    """A time, in UTC where it names no zone."""
    try:
        time = datetime.fromisoformat(value or "")
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
