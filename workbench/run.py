"""Running a recipe: stage after stage, each at most once.

A stage writes ``<out>/<stage>/``. One that is finished with the same fingerprint is kept, one that was stopped goes on;
anything else that stands in its place is refused, or moved aside on request, never overwritten.
"""

import itertools
import json
import os
import time
import traceback
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException

from workbench import artifact, progress, records, yaml_io
from workbench.arguments import Arguments, essential
from workbench.ranks import rank
from workbench.recipe import REPLACED, Recipe, nearest
from workbench.source import Source

_POLL = 0.2
_RECORDED = (
    "stage",
    "job",
    "status",
    "fingerprint",
    "given",
    "arguments",
    "parents",
    "versions",
    "environment",
    "started",
)
_BEGAN = records.now()


class StageError(RuntimeError):
    """A stage failed; its record says why."""


def check(recipe: Recipe) -> list[Arguments]:
    """Check every stage of the recipe before the first one runs.

    Raises:
        RecipeError: On a wrong argument, a stage named before it exists, a cycle, or a missing folder.
    """
    plan = [Arguments(recipe, stage) for stage in recipe.stages]
    names = [stage.name for stage in recipe.stages]
    refers = {a.stage.name: [_stage_of(source, names) or str(source) for _, source in a.sources()] for a in plan}
    for position, arguments in enumerate(plan):
        name = arguments.stage.name
        for key, source in arguments.sources():
            stage = _stage_of(source, names)
            if stage in names[:position]:
                _check_member(recipe, plan[names.index(stage)], source, name, key)
                continue
            if stage == name:
                raise recipe.error(
                    f"the stage names itself: name one above it{nearest('', names[:position])}", name, key
                )
            if stage is not None:
                if path := _path(refers, stage, name):
                    cycle = " -> ".join([name, *path])
                    raise recipe.error(f"the stages need each other in a cycle: {cycle}", name, key)
                raise recipe.error(f"stage '{stage}' is named before it exists: move it above '{name}'", name, key)
            if not Path(source).exists() and not _hub_name(source):
                hint = nearest(source, names[:position])
                raise recipe.error(f"'{source}' is neither a stage above nor a folder{hint}", name, key)
    return plan


def run(recipe: Recipe, out: Path, replace: bool = False) -> list[dict[str, Any]]:
    """Run every stage that is not finished yet; return all their records.

    Args:
        recipe: The recipe.
        out: The run's folder.
        replace: Move a stage's folder that holds something else aside, instead of refusing.

    Raises:
        RecipeError: If the recipe is wrong, or a folder holds something else or cannot be read.
        StageError: If a stage fails, or its record cannot be written.
    """
    plan = check(recipe)
    lineage = _lineage(plan)
    if rank() == 0:
        _claim(recipe, plan, lineage, out, replace)
    done: list[dict[str, Any]] = []
    with progress.bars(len(plan), list(lineage)) as bars:
        for arguments in plan:
            name = arguments.stage.name
            with bars.stage(name):
                record = _finished(out / name, lineage[name][0])
                if record is None:
                    record = _run_stage(arguments, out, lineage)
                    bars.note(_score(record))
                else:
                    bars.note(", ".join(filter(None, ("kept", _score(record)))))
            done.append(record)
    return done


def _run_stage(arguments: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    name = arguments.stage.name
    folder, (fingerprint, parents) = out / name, lineage[name]
    if rank() != 0 and not arguments.trains:
        return _awaited(folder, fingerprint)
    record: dict[str, Any] = {
        "stage": name,
        "job": arguments.stage.job.name,
        "status": "running",
        "fingerprint": fingerprint,
        "given": arguments.stage.arguments,
        "arguments": arguments.resolved(),
        "seed": arguments.seed,
        "parents": parents,
        "versions": records.versions(),
        "environment": records.environment(),
        "started": (records.read(folder) or {}).get("started", records.now()),
    }
    _write(folder, record)
    began = time.monotonic()
    try:
        seed_everything(arguments.seed or 0, workers=True, verbose=False)
        made = arguments.build(lambda source: Source(out / source) if _stage_of(source, lineage) else source)
        result = _result(arguments.stage.job.function(**made, out=folder))
        seconds = round(time.monotonic() - began, 3)
        finished = {**record, "seconds": seconds, **result, "status": "finished", "ended": records.now()}
        _write(folder, finished)
    except SIGTERMException:
        raise  # asked to stop: unfinished, not failed
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # how Lightning passes Ctrl-C on
        raise _failed(folder, record, error) from error
    return finished if rank() == 0 else _awaited(folder, fingerprint)


def _result(returned: Any) -> dict[str, Any]:
    """What a job returned, as entries of a record.

    Raises:
        ValueError: If it is not a mapping of JSON values, or has an entry that every record has.
    """
    result = {} if returned is None else returned
    if not isinstance(result, Mapping):
        raise ValueError(f"the job returned {type(result).__name__}: a job returns a dict of results, or None")
    for key, value in result.items():
        if key in _RECORDED:
            raise ValueError(f"the job returned {key!r}, which every record has: give it another name")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the job returned {key!r}, which is not JSON: {error}") from error
    return dict(result)


def _failed(folder: Path, record: Mapping[str, Any], error: BaseException) -> StageError:
    """Record the failure; the error to raise for it."""
    said = f"stage '{record['stage']}': {type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    try:
        _write(folder, {**record, "status": "failed", "error": text, "ended": records.now()})
    except StageError as unwritten:
        return StageError(f"{said}\n{unwritten}" if not isinstance(error, StageError) else str(unwritten))
    return StageError(f"{said}\nThe full traceback is in {folder / 'record.json'}; the same command tries again.")


def _lineage(plan: Sequence[Arguments]) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each stage its fingerprint, and its parents by the argument that names them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for arguments in plan:
        prints: dict[str, str] = {}
        parents: dict[str, Any] = {}
        for key, source in arguments.sources():
            stage = _stage_of(source, found)
            prints[key] = found[stage][0] if stage else _content(source)
            parents[key] = {"stage": str(source), "fingerprint": prints[key] if stage else None}
        if not prints and not arguments.trains:
            # It names no stage and trains nothing: like a report, it may look at everything above it.
            prints = {f"above/{name}": fingerprint for name, (fingerprint, _) in found.items()}
        found[arguments.stage.name] = arguments.fingerprint(prints), parents
    return found


def _stage_of(source: Source, names: Container[str]) -> str | None:
    """The stage that ``source`` means, if it is one of ``names``: by its name, or as ``stage/student`` of a family."""
    stage, _, member = source.partition("/")
    if source in names:
        return str(source)
    return stage if stage in names and member and "/" not in member else None


def _check_member(recipe: Recipe, family: Arguments, source: Source, name: str, key: str) -> None:
    """Refuse a source that names no network, or not which of a stage's several."""
    stage, _, member = source.partition("/")
    if not family.trains or member in family.members or not (member or family.members):
        return
    whole = [f"{stage}/{known}" for known in family.members]
    if not member:
        raise recipe.error(f"stage '{stage}' trains a family: name one of {', '.join(whole)}", name, key)
    hint = nearest(source, whole) if whole else f": it trains one network, name it '{stage}'"
    raise recipe.error(f"stage '{stage}' has no '{member}'{hint}", name, key)


def _content(source: Source) -> str:
    """What stands for a folder outside the run: its checkpoint's hash, weights and architecture, else its path."""
    try:
        return artifact.read_index(artifact.find(source))["sha256"]
    except ValueError:
        return str(source)


def _claim(
    recipe: Recipe, plan: Sequence[Arguments], lineage: Mapping[str, tuple[str, Any]], out: Path, replace: bool
) -> None:
    """Make sure that no folder holds what another recipe left there, before anything is trained."""
    foreign: list[Path] = []
    for arguments in plan:
        name = arguments.stage.name
        try:
            why = _occupied(out / name, arguments, *lineage[name])
        except (OSError, ValueError) as error:
            if not replace or isinstance(error, OSError):
                raise recipe.error(f"{out / name}: {error}", name) from error
            why = str(error)
        if why and not replace:
            raise recipe.error(f"{out / name} {why}: choose another --out, or --replace to move it aside", name)
        if why:
            foreign.append(out / name)
    for folder in foreign:
        places = (out / REPLACED / f"{folder.name}-{n}" for n in itertools.count(1))
        aside = next(place for place in places if not place.exists())
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
        except OSError as error:
            raise recipe.error(f"{folder} cannot be moved to {aside}: {error.strerror}", folder.name) from error


def _occupied(folder: Path, arguments: Arguments, fingerprint: str, parents: Mapping[str, Any]) -> str | None:
    """What the stage's folder holds that is not this stage; None if it is free."""
    record = records.read(folder)
    if record is None:
        # A run that is killed while it writes its first record leaves only a hidden temporary.
        if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
            return None
        return "exists and was not written by a recipe" if folder.exists() else None
    if record.get("fingerprint") == fingerprint:
        return None
    return f"holds a {record.get('status')} stage made with {_difference(record, arguments, parents)}"


def _difference(record: Mapping[str, Any], arguments: Arguments, parents: Mapping[str, Any]) -> str:
    """What makes the stage in a record another one, for a message."""
    job = arguments.stage.job.name
    if record.get("job") != job:
        return f"job {record.get('job')} instead of {job}"
    before, now = essential(record.get("arguments") or {}), essential(arguments.resolved())
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changed = [f"{key} {_said(before, key)} instead of {_said(now, key)}" for key in keys]
    if not changed:
        old = record.get("parents") or {}
        changed = [f"another '{p['stage']}' as {key}" for key, p in parents.items() if old.get(key) != p]
    return ", ".join(changed[:4]) + (" and more" if len(changed) > 4 else "") or "other stages above it"


def _said(values: Mapping[str, Any], key: str) -> str:
    return yaml_io.inline(values[key]) if key in values else "nothing"


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    record = records.finished(folder)
    return record if record and record.get("fingerprint") == fingerprint else None


def _awaited(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The record that rank zero writes when it is done; other ranks wait for it, as long as their parent lives."""
    parent = os.getppid()
    while (record := _finished(folder, fingerprint)) is None:
        if os.getppid() != parent:
            raise StageError(f"rank 0 is gone before {folder} was finished")
        record = records.read(folder) or {}
        # An older failure is about to be tried again: rank zero has only not come so far yet.
        if record.get("status") == "failed" and record.get("ended", "") >= _BEGAN:
            raise StageError(f"rank 0 failed in {folder}")
        time.sleep(_POLL)
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    if rank() != 0:
        return
    try:
        records.write(folder, record)
    except OSError as error:
        why = f"{folder}: cannot be written: {error.strerror}"
        raise StageError(
            f"{why}. What is there is whole: make room or choose another --out, and start again."
        ) from error


def _path(refers: Mapping[str, list[str]], start: str, goal: str) -> list[str] | None:
    """Stages from ``start`` to ``goal`` along references, both included, or None."""
    todo, seen = [[start]], {start}
    while todo:
        path = todo.pop()
        if path[-1] == goal:
            return path
        for name in refers.get(path[-1], []):
            if name not in seen:
                seen.add(name)
                todo.append([*path, name])
    return None


def _hub_name(source: str) -> bool:
    """``owner/name``, as model hubs have it; not a path that was mistyped."""
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not owner.startswith((".", "~")) and not Path(owner).exists()


def _score(record: Mapping[str, Any]) -> str:
    name = (record.get("monitor") or ["loss"])[0]
    value = (record.get("metrics") or {}).get(f"test/{name}")
    if value is None:
        return ""
    return f"test {name} {value:.1%}" if name == "accuracy" else f"test {name} {value:.4g}"
