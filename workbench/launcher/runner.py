"""Running a recipe: stage after stage, each at most once.

A stage writes ``<out>/<stage>/``, above all ``record.json`` with its status and fingerprint (see `lineage`). The life
of a stage's folder:

    absent --> running --> finished      the job returned; its results are in the record
                 |  ^
                 |  +--- stopped         still says "running": Ctrl-C, SIGTERM, a kill, a power cut
                 +--> failed             the job raised; the traceback is in the record

What :func:`run` does with a folder that exists, before anything is trained:

    same fingerprint, finished           kept: nothing is run or written
    same fingerprint, running or failed  resumed: the job is called again with the same folder and continues from what
                                         it left there (each job decides what that is, e.g. a checkpoint)
    another fingerprint, or no record    refused, naming what differs; with ``--replace`` moved to ``<out>/replaced``

Nothing is overwritten or deleted. ``<out>`` is locked meanwhile. In distributed training every rank runs the jobs that
train; rank zero alone runs the others and writes all records, and the other ranks wait for its record.
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
from workbench.definitions import difference as code_difference
from workbench.distributed.ranks import rank
from workbench.launcher.arguments import Arguments, essential
from workbench.launcher.lineage import check, find_stage, lineage_of
from workbench.launcher.recipe import REPLACED, RUN, Recipe, RecipeError
from workbench.launcher.runs import LOG, Runs
from workbench.messages import difference
from workbench.records.lock import locked
from workbench.records.source import Source
from workbench.report.format import metric

_POLL = 0.2
_RESERVED = ("stage", "job", "status", "fingerprint", "given", "arguments", "parents")
_RESERVED += ("code", "versions", "environment", "started", "took")
_PROCESS_STARTED = records.now()


class StageError(RuntimeError):
    """A stage failed; its record holds the traceback.

    Args:
        message: The error message.
        results: Partial results, for the record.
    """

    def __init__(self, message: str, results: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.results = dict(results or {})


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
    finished: list[dict[str, Any]] = []
    with _lock(out), progress.bars(len(plan), [arguments.stage.name for arguments in plan]) as bars:
        if rank() == 0:
            _check_folders(recipe, plan, lineage, out, replace)
        for arguments in plan:
            name = arguments.stage.name
            with bars.stage(name):
                record = _finished_stage(arguments, out, lineage)
                if record is None:
                    record = run_stage(arguments, out, lineage)
                    bars.note(score(record), record.get("took"))
                else:
                    bars.note(", ".join(filter(None, ("kept", score(record)))))
            finished.append(record)
    return finished


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Inside, no other process runs a recipe in ``out``."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except ValueError as error:
            raise RecipeError(str(error)) from error
        yield


def run_stage(arguments: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Run one stage in its folder, ``<out>/<name>``; returns its record.

    Args:
        arguments: The stage's arguments.
        out: The run's folder.
        lineage: Fingerprint and parents of this stage and of those above it.

    Raises:
        StageError: If it fails, or its record cannot be written.
    """
    name = arguments.stage.name
    folder, (fingerprint, parents) = out / name, lineage[name]
    if rank() != 0 and not arguments.trains:
        return _wait_for_rank_zero(folder, fingerprint)
    record: dict[str, Any] = {
        "stage": name,
        "job": arguments.stage.job.name,
        "status": "running",
        "fingerprint": fingerprint,
        "given": arguments.stage.arguments,
        "arguments": arguments.resolved(),
        "seed": arguments.seed,
        "parents": parents,
        **({"code": arguments.code} if arguments.code else {}),
        "versions": records.versions(),
        "environment": records.environment(),
        "started": (records.read(folder) or {}).get("started", records.now()),
    }
    _write(folder, record)
    start = time.monotonic()
    try:
        seed_everything(arguments.seed or 0, workers=True, verbose=False)
        built = arguments.build(lambda source: Source(out / source) if find_stage(source, lineage) else source)
        if arguments.runs:
            built[RUN] = Runs(arguments.runs, out, lineage)
        result = _result(arguments.stage.job.function(**built, out=folder))
        took = round(time.monotonic() - start, 3)
        finished = {**record, "seconds": took, **result, "took": took, "status": "finished", "ended": records.now()}
        _write(folder, finished)
    except SIGTERMException as error:
        # SIGTERM: the stage is unfinished, not failed. Lightning itself would exit with 0, as if all were well.
        raise SystemExit(128 + signal.SIGTERM) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # Lightning turns Ctrl-C into SystemExit
        raise _record_failure(folder, record, error) from error
    return finished if rank() == 0 else _wait_for_rank_zero(folder, fingerprint)


def _result(returned: Any) -> dict[str, Any]:
    """What a job returned, as entries of its record.

    Raises:
        ValueError: If it is not a mapping of JSON values, or has an entry that every record has.
    """
    result = {} if returned is None else returned
    if not isinstance(result, Mapping):
        raise ValueError(f"the job returned {type(result).__name__}: a job returns a dict of results, or None")
    for key, value in result.items():
        if key in _RESERVED:
            raise ValueError(f"the job returned {key!r}, which every record has: give it another name")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the job returned {key!r}, which is not JSON: {error}") from error
    return dict(result)


def _record_failure(folder: Path, record: Mapping[str, Any], error: BaseException) -> StageError:
    """Record the failure; returns the error to raise for it."""
    kind = "" if isinstance(error, StageError) else f"{type(error).__name__}: "
    message = f"stage '{record['stage']}': {kind}{error}"
    record = {**record, **getattr(error, "results", {})}
    text = "".join(traceback.format_exception(error))
    try:
        _write(folder, {**record, "status": "failed", "error": text, "ended": records.now()})
    except StageError as unwritten:
        return StageError(f"{message}\n{unwritten}" if not isinstance(error, StageError) else str(unwritten))
    return StageError(f"{message}\nThe full traceback is in {folder / 'record.json'}; the same command tries again.")


def _check_folders(
    recipe: Recipe, plan: Sequence[Arguments], lineage: Mapping[str, tuple[str, Any]], out: Path, replace: bool
) -> None:
    """Refuse, or with ``replace`` move aside, folders of other stages than the plan's; before anything is trained."""
    conflicting: list[Path] = []
    for arguments in (part for each in plan for part in (each, *each.runs)):
        name = arguments.stage.name
        if out / name in conflicting or (out / name).parent in conflicting:
            continue
        try:
            conflict = _conflict(out / name, arguments, *lineage[name])
        except (OSError, ValueError) as error:
            if not replace or isinstance(error, OSError):
                raise recipe.error(f"{out / name}: {error}", name) from error
            conflict = str(error)
        if conflict and not replace:
            raise recipe.error(f"{out / name} {conflict}: choose another --out, or --replace to move it aside", name)
        if conflict:
            conflicting.append(out / name)
    for folder in conflicting:
        candidates = (out / REPLACED / f"{folder.relative_to(out)}-{n}" for n in itertools.count(1))
        aside = next(path for path in candidates if not path.exists())
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
        except OSError as error:
            raise recipe.error(f"{folder} cannot be moved to {aside}: {error.strerror}", folder.name) from error


def _conflict(folder: Path, arguments: Arguments, fingerprint: str, parents: Mapping[str, Any]) -> str | None:
    """What the stage's folder holds that is not this stage; None if the stage can be run there."""
    record = records.read(folder)
    if record is None:
        # A run that is killed while it writes its first record leaves only hidden files and its log.
        if folder.is_dir() and all(path.name.startswith(".") or path.name == LOG for path in folder.iterdir()):
            return None
        return "exists and was not written by a recipe" if folder.exists() else None
    if record.get("fingerprint") == fingerprint:
        return None
    if arguments.runs and record.get("job") == arguments.stage.job.name:
        return None  # a grid may grow: each of its runs is checked by itself
    return f"holds a {record.get('status')} stage made with {_what_differs(record, arguments, parents)}"


def _what_differs(record: Mapping[str, Any], arguments: Arguments, parents: Mapping[str, Any]) -> str:
    """What distinguishes the stage in a record from this one, for an error message."""
    job = arguments.stage.job.name
    if record.get("job") != job:
        return f"job {record.get('job')} instead of {job}"
    before, now = essential(record.get("arguments") or {}), essential(arguments.resolved())
    changed = difference(before, now)
    if code := code_difference(record.get("code") or {}, arguments.code):
        code = f"other code ({code})"
    if changed or code:
        return ", ".join(filter(None, (changed, code)))
    old = record.get("parents") or {}
    others = [f"another '{parent['stage']}' as {key}" for key, parent in parents.items() if old.get(key) != parent]
    return ", ".join(others) or "other stages above it"


def _finished_stage(arguments: Arguments, out: Path, lineage: Mapping[str, tuple[str, Any]]) -> dict[str, Any] | None:
    """The stage's record if it is finished. A sweep is finished if all its runs still are."""
    if not all(_finished_record(out / run.stage.name, lineage[run.stage.name][0]) for run in arguments.runs):
        return None
    return _finished_record(out / arguments.stage.name, lineage[arguments.stage.name][0])


def _finished_record(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    record = records.finished(folder)
    return record if record and record.get("fingerprint") == fingerprint else None


def _wait_for_rank_zero(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Wait for the finished record that rank zero writes; fails if rank zero fails or this process loses its parent."""
    parent = os.getppid()
    while (record := _finished_record(folder, fingerprint)) is None:
        if os.getppid() != parent:
            raise StageError(f"rank 0 is gone before {folder} was finished")
        record = records.read(folder) or {}
        # A failure from before this process started is an earlier run's: rank zero is about to run the stage again.
        if record.get("status") == "failed" and record.get("ended", "") >= _PROCESS_STARTED:
            raise StageError(f"rank 0 failed in {folder}")
        time.sleep(_POLL)
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    if rank() != 0:
        return
    try:
        records.write(folder, record)
    except OSError as error:
        problem = f"{folder}: cannot be written: {error.strerror}"
        raise StageError(
            f"{problem}. What is there is whole: make room or choose another --out, and start again."
        ) from error


def score(record: Mapping[str, Any]) -> str:
    """The main test metric of a record as text, or its number of runs; empty if it has neither."""
    if runs := record.get("runs"):
        return f"{len(runs)} runs"
    name, mode = record.get("monitor") or ("loss", "min")
    value = (record.get("metrics") or {}).get(f"test/{name}")
    if value is None:
        return ""
    return f"test {name} {value:.1%}" if metric(name, mode, [value]).share else f"test {name} {value:.4g}"
