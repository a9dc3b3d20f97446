"""Running a recipe: stage after stage, each at most once.

A stage writes ``<out>/<stage>/``. One that is finished with the same fingerprint is kept, one that was stopped goes on;
anything else that stands in its place is refused, or moved aside on request, never overwritten.
"""

import itertools
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException

from workbench import progress, records
from workbench.distributed.ranks import rank
from workbench.launcher.arguments import Arguments, essential
from workbench.launcher.lineage import check, lineage_of, stage_of
from workbench.launcher.recipe import REPLACED, RUN, Recipe, RecipeError
from workbench.launcher.runs import LOG, Runs
from workbench.messages import difference
from workbench.records.lock import locked
from workbench.records.source import Source

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
    """A stage failed; its record says why.

    Args:
        message: What to tell.
        found: Results that it has all the same, for its record.
    """

    def __init__(self, message: str, found: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = dict(found or {})


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
    lineage = lineage_of(plan)
    done: list[dict[str, Any]] = []
    with _alone(out), progress.bars(len(plan), [arguments.stage.name for arguments in plan]) as bars:
        if rank() == 0:
            _claim(recipe, plan, lineage, out, replace)
        for arguments in plan:
            name = arguments.stage.name
            with bars.stage(name):
                record = _kept(arguments, out, lineage)
                if record is None:
                    record = run_stage(arguments, out, lineage)
                    bars.note(score(record))
                else:
                    bars.note(", ".join(filter(None, ("kept", score(record)))))
            done.append(record)
    return done


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Inside, no other process runs a recipe in ``out``."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except ValueError as error:
            raise RecipeError(str(error)) from error
        yield


def run_stage(arguments: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Run one stage, in ``<out>/<its name>``; its record.

    Args:
        arguments: The stage's.
        out: The run's folder.
        lineage: Fingerprint and parents, of this stage and of those above it.

    Raises:
        StageError: If it fails, or its record cannot be written.
    """
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
        made = arguments.build(lambda source: Source(out / source) if stage_of(source, lineage) else source)
        if arguments.runs:
            made[RUN] = Runs(arguments.runs, out, lineage)
        result = _result(arguments.stage.job.function(**made, out=folder))
        seconds = round(time.monotonic() - began, 3)
        finished = {**record, "seconds": seconds, **result, "status": "finished", "ended": records.now()}
        _write(folder, finished)
    except SIGTERMException as error:
        # Asked to stop: unfinished, not failed. Lightning's own exit status would say that all is well.
        raise SystemExit(128 + signal.SIGTERM) from error
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
    kind = "" if isinstance(error, StageError) else f"{type(error).__name__}: "
    said = f"stage '{record['stage']}': {kind}{error}"
    record = {**record, **getattr(error, "found", {})}
    text = "".join(traceback.format_exception(error))
    try:
        _write(folder, {**record, "status": "failed", "error": text, "ended": records.now()})
    except StageError as unwritten:
        return StageError(f"{said}\n{unwritten}" if not isinstance(error, StageError) else str(unwritten))
    return StageError(f"{said}\nThe full traceback is in {folder / 'record.json'}; the same command tries again.")


def _claim(
    recipe: Recipe, plan: Sequence[Arguments], lineage: Mapping[str, tuple[str, Any]], out: Path, replace: bool
) -> None:
    """Make sure that no folder holds what another recipe left there, before anything is trained."""
    foreign: list[Path] = []
    for arguments in (part for each in plan for part in (each, *each.runs)):
        name = arguments.stage.name
        if out / name in foreign or (out / name).parent in foreign:
            continue
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
        places = (out / REPLACED / f"{folder.relative_to(out)}-{n}" for n in itertools.count(1))
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
        # A run that is killed before its first record is whole leaves only hidden files, and what it said.
        if folder.is_dir() and all(path.name.startswith(".") or path.name == LOG for path in folder.iterdir()):
            return None
        return "exists and was not written by a recipe" if folder.exists() else None
    if record.get("fingerprint") == fingerprint:
        return None
    if arguments.runs and record.get("job") == arguments.stage.job.name:
        return None  # a grid may grow: each of its runs is looked at by itself
    return f"holds a {record.get('status')} stage made with {_difference(record, arguments, parents)}"


def _difference(record: Mapping[str, Any], arguments: Arguments, parents: Mapping[str, Any]) -> str:
    """What makes the stage in a record another one, for a message."""
    job = arguments.stage.job.name
    if record.get("job") != job:
        return f"job {record.get('job')} instead of {job}"
    before, now = essential(record.get("arguments") or {}), essential(arguments.resolved())
    if changed := difference(before, now):
        return changed
    old = record.get("parents") or {}
    others = [f"another '{parent['stage']}' as {key}" for key, parent in parents.items() if old.get(key) != parent]
    return ", ".join(others) or "other stages above it"


def _kept(arguments: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]]) -> dict[str, Any] | None:
    """The stage's record if it is finished; a sweep is if all its runs still are."""
    if not all(_finished(out / run.stage.name, lineage[run.stage.name][0]) for run in arguments.runs):
        return None
    return _finished(out / arguments.stage.name, lineage[arguments.stage.name][0])


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


def score(record: Mapping[str, Any]) -> str:
    """The main test metric of a record in words, or how many runs it has; empty if there is neither."""
    if runs := record.get("runs"):
        return f"{len(runs)} runs"
    name = (record.get("monitor") or ["loss"])[0]
    value = (record.get("metrics") or {}).get(f"test/{name}")
    if value is None:
        return ""
    return f"test {name} {value:.1%}" if name == "accuracy" else f"test {name} {value:.4g}"
