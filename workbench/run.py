"""Running a recipe: stage after stage, each at most once.

A stage writes ``<out>/<stage>/``. One that is finished with the same fingerprint is kept, one that was stopped goes on;
anything else that stands in its place is refused, never overwritten.
"""

import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from workbench import progress, records
from workbench.arguments import Arguments
from workbench.recipe import Recipe, RecipeError
from workbench.source import Source
from workbench.training import rank

_POLL = 0.2


class StageError(RuntimeError):
    """A stage failed; its record says why."""


def check(recipe: Recipe) -> list[Arguments]:
    """Check every stage of the recipe before the first one runs.

    Raises:
        RecipeError: On a wrong argument, a stage named before it exists, a cycle, or a missing folder.
    """
    plan = [Arguments(recipe, stage) for stage in recipe.stages]
    names = [stage.name for stage in recipe.stages]
    refers = {a.stage.name: [str(source) for _, source in a.sources()] for a in plan}
    for position, arguments in enumerate(plan):
        for key, source in arguments.sources():
            name = arguments.stage.name
            if source in names[:position]:
                continue
            if source in names:
                if path := _path(refers, str(source), name):
                    cycle = " -> ".join([name, *path])
                    raise recipe.error(f"the stages need each other in a cycle: {cycle}", name, key)
                raise recipe.error(f"stage '{source}' is named before it exists: move it above '{name}'", name, key)
            if not Path(source).exists() and not _hub_name(source):
                from workbench.recipe import nearest

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
        RecipeError: If the recipe is wrong, or a folder holds another recipe's stage.
        StageError: If a stage fails.
    """
    plan = check(recipe)
    done: dict[str, dict[str, Any]] = {}
    fingerprints = _fingerprints(plan)
    if rank() == 0:
        _claim(recipe, plan, fingerprints, out, replace)
    names = [arguments.stage.name for arguments in plan]
    with progress.bars(len(plan), names) as bars:
        for arguments in plan:
            name = arguments.stage.name
            folder = out / name
            with bars.stage(name):
                record = _finished(folder, fingerprints[name])
                if record is None:
                    record = _run_stage(arguments, folder, fingerprints, out)
                    bars.note(_score(record))
                else:
                    bars.note(f"kept, {_score(record)}" if _score(record) else "kept")
            done[name] = record
    return list(done.values())


def _run_stage(arguments: Arguments, folder: Path, fingerprints: Mapping[str, str], out: Path) -> dict[str, Any]:
    name = arguments.stage.name
    if rank() != 0 and not arguments.trains:
        return _awaited(folder, fingerprints[name])
    parents = {
        key: {"stage": str(source), "fingerprint": fingerprints.get(str(source))}
        for key, source in arguments.sources()
    }
    record: dict[str, Any] = {
        "stage": name,
        "job": arguments.stage.job.name,
        "status": "running",
        "fingerprint": fingerprints[name],
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
        made = arguments.build(lambda source: Source(out / source) if source in fingerprints else source)
        result = arguments.stage.job.function(**made, out=folder)
    except (Exception, SystemExit) as error:
        _write(folder, {**record, "status": "failed", "error": traceback.format_exc()})
        if isinstance(error, SystemExit):
            raise
        raise StageError(f"stage '{name}': {type(error).__name__}: {error}") from error
    record |= {"seconds": round(time.monotonic() - began, 3), **result, "status": "finished", "ended": records.now()}
    _write(folder, record)
    return record if rank() == 0 else _awaited(folder, fingerprints[name])


def _fingerprints(plan: list[Arguments]) -> dict[str, str]:
    found: dict[str, str] = {}
    for arguments in plan:
        parents = {key: found.get(str(source)) or _content(source) for key, source in arguments.sources()}
        found[arguments.stage.name] = arguments.fingerprint(parents)
    return found


def _content(source: Source) -> str:
    """What stands for a folder outside the run: its checkpoint's hash, else its path."""
    from workbench import artifact

    try:
        return artifact.read_index(artifact.find(source))["weights"]["sha256"]
    except ValueError:
        return str(source)


def _claim(
    recipe: Recipe, plan: list[Arguments], fingerprints: Mapping[str, str], out: Path, replace: bool
) -> None:
    """Make sure that no folder holds what another recipe left there, before anything is trained."""
    for arguments in plan:
        name = arguments.stage.name
        folder = out / name
        record = records.read(folder)
        if (record or {}).get("fingerprint") == fingerprints[name]:
            continue
        if record is None and not (folder.is_dir() and any(folder.iterdir())):
            continue
        if replace:
            aside = next(p for n in range(1, 10_000) if not (p := out / f"{name}.old-{n}").exists())
            os.replace(folder, aside)
            continue
        if record is None:
            why = f"{folder} exists and was not written by a recipe"
        else:
            why = f"{folder} holds a {record.get('status')} stage made with {_difference(record, arguments)}"
        raise recipe.error(f"{why}: choose another --out, or --replace to move it aside", name)


def _difference(record: Mapping[str, Any], arguments: Arguments) -> str:
    """The arguments in which a record and a stage differ, for a message."""
    before, now = _flat(record.get("arguments") or {}), _flat(arguments.resolved())
    if record.get("job") != arguments.stage.job.name:
        return f"job {record.get('job')!r} instead of {arguments.stage.job.name!r}"
    changed = [f"{key} {before.get(key)!r} instead of {now.get(key)!r}" for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(changed[:4]) + (" and more" if len(changed) > 4 else "") or "other parents"


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{key}.{name}" if key else name).items()}
    return {key: value}


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    record = records.finished(folder)
    return record if record and record.get("fingerprint") == fingerprint else None


def _awaited(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The record that rank zero writes when it is done; other ranks wait for it, as long as their parent lives."""
    parent = os.getppid()
    while (record := _finished(folder, fingerprint)) is None:
        if os.getppid() != parent:
            raise StageError(f"rank 0 is gone before {folder} was finished")
        if (records.read(folder) or {}).get("status") == "failed":
            raise StageError(f"rank 0 failed in {folder}")
        time.sleep(_POLL)
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    if rank() == 0:
        records.write(folder, record)


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
    return bool(owner and name) and "/" not in name and not source.startswith(".")


def _score(record: Mapping[str, Any]) -> str:
    name = (record.get("monitor") or ["loss"])[0]
    value = (record.get("metrics") or {}).get(f"test/{name}")
    return f"test {name} {value:.1%}" if name == "accuracy" and value is not None else (
        f"test {name} {value:.4g}" if value is not None else ""
    )


__all__ = ["RecipeError", "StageError", "check", "run"]
