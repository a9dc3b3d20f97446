"""Lineage: what each stage is made from, and its fingerprint. Checked before the first stage runs.

A stage names its sources, earlier stages or folders outside the run, in arguments of type `Source`. Its *parents* are
these sources. Its *fingerprint* is a SHA-256 over

- the job's name,
- the resolved arguments that can change its result: without the trainer's logging and progress bars and without how
  often checkpoints are written (`arguments.essential`), and of the trainer only what the recipe gives, so that a new
  version's new defaults do not invalidate finished stages,
- the code of the classes and functions that these arguments name, and of what that uses, as far as it is not installed
  (`workbench.definitions`),
- for each parent, its fingerprint; for a folder outside the run the SHA-256 of its checkpoint and the code of its
  network's class, else its path.

So a change in one stage changes the fingerprints of all stages that depend on it. Two exceptions: a job that names no
stage and trains nothing, such as a report, depends on every stage above it; and a sweep's fingerprint is that of its
runs alone, not of how many workers ran them. The same fingerprint means the same work: the runner keeps such a stage.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import records
from workbench.checkpoints import compact
from workbench.definitions import definitions
from workbench.launcher.arguments import Arguments
from workbench.launcher.recipe import Recipe
from workbench.messages import closest, nearest
from workbench.records.source import Source

_LISTED = 8
_SIMILAR = 0.8  # a name on a model hub is not by chance as similar to ``stage/member``


def check(recipe: Recipe) -> list[Arguments]:
    """Check every stage of the recipe before the first one runs.

    Raises:
        RecipeError: On a wrong argument, a stage named before it exists, a cycle, or a missing folder.
    """
    plan = [Arguments(recipe, stage) for stage in recipe.stages]
    names = [stage.name for stage in recipe.stages]
    parts = {part.stage.name: (index, part) for index, each in enumerate(plan) for part in (each, *each.runs)}
    references = {
        stage.stage.name: [_referenced(source, parts, names) for _, source in _sources(stage)] for stage in plan
    }
    for name, (position, arguments) in parts.items():
        for key, source in arguments.sources():
            part = find_stage(source, parts)
            parent_position, parent = parts[part] if part else (None, None)
            if parent_position is None or parent is None:
                members = [f"{above.stage.name}/{member}" for above in plan[:position] for member in above.members]
                mistyped = closest(source, members, _SIMILAR)
                # `owner/name` may be a model on a hub, which is not looked up here, unless a stage is named alike.
                if not Path(source).exists() and (mistyped or not _is_hub_name(source)):
                    hint = nearest(source, [mistyped] if mistyped else names[:position])
                    raise recipe.error(f"'{source}' is neither a stage above nor a folder{hint}", name, key)
            elif parent_position < position:
                _check_member(recipe, parent, source, name, key)
            elif parent_position == position:
                raise recipe.error(
                    f"the stage names itself: name one above it{nearest('', names[:position])}", name, key
                )
            else:
                stage, own = names[parent_position], names[position]
                if path := _find_path(references, stage, own):
                    cycle = " -> ".join([own, *path])
                    raise recipe.error(f"the stages need each other in a cycle: {cycle}", name, key)
                raise recipe.error(f"stage '{stage}' is named before it exists: move it above '{own}'", name, key)
    return plan


def _sources(arguments: Arguments) -> Iterator[tuple[str, Source]]:
    """The sources of a stage and of its runs."""
    for part in (arguments, *arguments.runs):
        yield from part.sources()


def _referenced(source: Source, parts: Mapping[str, tuple[int, Arguments]], names: Sequence[str]) -> str:
    """The stage of the recipe that ``source`` belongs to, or the path of a folder."""
    part = find_stage(source, parts)
    return names[parts[part][0]] if part else str(source)


def lineage_of(plan: Sequence[Arguments]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Fingerprint and parents of each stage, the parents by the argument that names them."""
    lineage: dict[str, tuple[str, dict[str, Any]]] = {}
    for arguments in plan:
        for run in arguments.runs:
            fingerprints, parents = _parents(run, lineage)
            lineage[run.stage.name] = run.fingerprint(fingerprints), parents
        fingerprints, parents = _parents(arguments, lineage)
        if not fingerprints and not arguments.trains and not arguments.runs:
            # It names no stage and trains nothing: like a report, it may read every stage above it.
            fingerprints = {
                f"above/{name}": fingerprint for name, (fingerprint, _) in lineage.items() if "/" not in name
            }
        lineage[arguments.stage.name] = arguments.fingerprint(fingerprints), parents
        if arguments.runs:
            # Workers and retries do not change the result; which runs there are does.
            runs = {run.stage.name: lineage[run.stage.name] for run in arguments.runs}
            whole = [arguments.stage.job.name, {name: fingerprint for name, (fingerprint, _) in runs.items()}]
            lineage[arguments.stage.name] = (
                records.fingerprint(whole),
                _shared_parents(parents for _, parents in runs.values()),
            )
    return lineage


def _parents(
    arguments: Arguments, lineage: Mapping[str, tuple[str, dict[str, Any]]]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Fingerprints and record entries of a stage's sources, both by the argument that names the source."""
    fingerprints: dict[str, str] = {}
    parents: dict[str, Any] = {}
    for key, source in arguments.sources():
        stage = find_stage(source, lineage)
        fingerprints[key] = lineage[stage][0] if stage else _folder_identity(source)
        parents[key] = {"stage": str(source), "fingerprint": fingerprints[key] if stage else None}
    return fingerprints, parents


def _shared_parents(each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The parents of all runs, by the argument that names them; with the stage where runs name different ones."""
    pairs = {(key, parent["stage"]): parent for parents in each for key, parent in parents.items()}
    keys = [key for key, _ in pairs]
    return {key if keys.count(key) == 1 else f"{key} {stage}": parent for (key, stage), parent in pairs.items()}


def find_stage(source: Source, names: Container[str]) -> str | None:
    """The one of ``names`` that ``source`` names, as ``stage`` or as ``stage/member``; None if there is none."""
    stage, _, member = source.rpartition("/")
    if source in names:
        return str(source)
    return stage if stage in names and member else None


def _check_member(recipe: Recipe, family: Arguments, source: Source, name: str, key: str) -> None:
    """Check that ``source`` names one network: a member if the stage has several, no member if it has one."""
    stage = family.stage.name
    member = source.removeprefix(stage).removeprefix("/")
    if not (family.trains or family.runs) or member in family.members or not (member or family.members):
        return
    if family.runs and not member and key.endswith("]"):
        return  # in a list of stages a sweep means all of its runs
    whole = [f"{stage}/{label}" for label in family.members]
    if not member:
        what = "is a sweep" if family.runs else "trains a family"
        more = f" and {len(whole) - _LISTED} more" if len(whole) > _LISTED else ""
        raise recipe.error(f"stage '{stage}' {what}: name one of {', '.join(whole[:_LISTED])}{more}", name, key)
    hint = nearest(source, whole) if whole else f": it trains one network, name it '{stage}'"
    raise recipe.error(f"stage '{stage}' has no '{member}'{hint}", name, key)


def _folder_identity(source: Source) -> str:
    """A folder outside the run in a fingerprint: its checkpoint's SHA-256 and its network's code, else its path."""
    try:
        index = compact.read_index(compact.find(source))
    except ValueError:
        return str(source)
    code = definitions([(index["architecture"] or {}).get("class_path", "")])
    return records.fingerprint([index["sha256"], code]) if code else index["sha256"]


def _find_path(references: Mapping[str, list[str]], start: str, goal: str) -> list[str] | None:
    """The stages from ``start`` to ``goal`` along references, both included; None if there is no path."""
    todo, seen = [[start]], {start}
    while todo:
        path = todo.pop()
        if path[-1] == goal:
            return path
        for name in references.get(path[-1], []):
            if name not in seen:
                seen.add(name)
                todo.append([*path, name])
    return None


def _is_hub_name(source: str) -> bool:
    """Whether ``source`` can be ``owner/name`` on a model hub, and not a misspelt path."""
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not owner.startswith((".", "~")) and not Path(owner).exists()
