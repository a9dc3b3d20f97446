"""What the stages of a recipe come from: each other, or folders outside of it. Checked before the first one runs."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import records
from workbench.checkpoints import compact
from workbench.launcher.arguments import Arguments
from workbench.launcher.recipe import Recipe
from workbench.messages import closest, nearest
from workbench.records.source import Source

_NAMED = 8
_MISTYPED = 0.8  # as near to ``stage/member`` no hub's name is by chance


def check(recipe: Recipe) -> list[Arguments]:
    """Check every stage of the recipe before the first one runs.

    Raises:
        RecipeError: On a wrong argument, a stage named before it exists, a cycle, or a missing folder.
    """
    plan = [Arguments(recipe, stage) for stage in recipe.stages]
    names = [stage.name for stage in recipe.stages]
    parts = {part.stage.name: (place, part) for place, each in enumerate(plan) for part in (each, *each.runs)}
    refers = {name: [_refers(source, parts, names) for _, source in _sources(plan[i])] for i, name in enumerate(names)}
    for name, (position, arguments) in parts.items():
        for key, source in arguments.sources():
            part = stage_of(source, parts)
            place, whole = parts[part] if part else (None, None)
            if place is None or whole is None:
                known = [f"{above.stage.name}/{member}" for above in plan[:position] for member in above.members]
                mistyped = closest(source, known, _MISTYPED)
                if not Path(source).exists() and (mistyped or not _hub_name(source)):
                    hint = nearest(source, [mistyped] if mistyped else names[:position])
                    raise recipe.error(f"'{source}' is neither a stage above nor a folder{hint}", name, key)
            elif place < position:
                _check_member(recipe, whole, source, name, key)
            elif place == position:
                raise recipe.error(
                    f"the stage names itself: name one above it{nearest('', names[:position])}", name, key
                )
            else:
                stage, own = names[place], names[position]
                if path := _path(refers, stage, own):
                    cycle = " -> ".join([own, *path])
                    raise recipe.error(f"the stages need each other in a cycle: {cycle}", name, key)
                raise recipe.error(f"stage '{stage}' is named before it exists: move it above '{own}'", name, key)
    return plan


def _sources(arguments: Arguments) -> Iterator[tuple[str, Source]]:
    """Of a stage, and of a sweep's runs."""
    for part in (arguments, *arguments.runs):
        yield from part.sources()


def _refers(source: Source, parts: Mapping[str, tuple[int, Arguments]], names: Sequence[str]) -> str:
    part = stage_of(source, parts)
    return names[parts[part][0]] if part else str(source)


def lineage_of(plan: Sequence[Arguments]) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each stage its fingerprint, and its parents by the argument that names them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for arguments in plan:
        for run in arguments.runs:
            prints, parents = _parents(run, found)
            found[run.stage.name] = run.fingerprint(prints), parents
        prints, parents = _parents(arguments, found)
        if not prints and not arguments.trains and not arguments.runs:
            # It names no stage and trains nothing: like a report, it may look at everything above it.
            prints = {f"above/{name}": fingerprint for name, (fingerprint, _) in found.items() if "/" not in name}
        found[arguments.stage.name] = arguments.fingerprint(prints), parents
        if arguments.runs:
            # Where and how often its runs are tried changes nothing; which they are, does.
            runs = {run.stage.name: found[run.stage.name] for run in arguments.runs}
            whole = [arguments.stage.job.name, {name: fingerprint for name, (fingerprint, _) in runs.items()}]
            found[arguments.stage.name] = records.fingerprint(whole), _shared(parents for _, parents in runs.values())
    return found


def _parents(
    arguments: Arguments, found: Mapping[str, tuple[str, dict[str, Any]]]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Of every source of a stage what stands for it, and what its record says of it, by the argument that names it."""
    prints: dict[str, str] = {}
    parents: dict[str, Any] = {}
    for key, source in arguments.sources():
        stage = stage_of(source, found)
        prints[key] = found[stage][0] if stage else _content(source)
        parents[key] = {"stage": str(source), "fingerprint": prints[key] if stage else None}
    return prints, parents


def _shared(each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The parents of all runs: by the argument that names them, or by that and the stage where it names several."""
    pairs = {(key, parent["stage"]): parent for parents in each for key, parent in parents.items()}
    keys = [key for key, _ in pairs]
    return {key if keys.count(key) == 1 else f"{key} {stage}": parent for (key, stage), parent in pairs.items()}


def stage_of(source: Source, names: Container[str]) -> str | None:
    """The stage that ``source`` means, if it is one of ``names``: by its name, or as ``stage/student`` of a family."""
    stage, _, member = source.rpartition("/")
    if source in names:
        return str(source)
    return stage if stage in names and member else None


def _check_member(recipe: Recipe, family: Arguments, source: Source, name: str, key: str) -> None:
    """Refuse a source that names no network, or not which of a stage's several."""
    stage = family.stage.name
    member = source.removeprefix(stage).removeprefix("/")
    if not (family.trains or family.runs) or member in family.members or not (member or family.members):
        return
    if family.runs and not member and key.endswith("]"):
        return  # where several stages are asked for, a sweep stands for its runs
    whole = [f"{stage}/{known}" for known in family.members]
    if not member:
        what = "is a sweep" if family.runs else "trains a family"
        more = f" and {len(whole) - _NAMED} more" if len(whole) > _NAMED else ""
        raise recipe.error(f"stage '{stage}' {what}: name one of {', '.join(whole[:_NAMED])}{more}", name, key)
    hint = nearest(source, whole) if whole else f": it trains one network, name it '{stage}'"
    raise recipe.error(f"stage '{stage}' has no '{member}'{hint}", name, key)


def _content(source: Source) -> str:
    """What stands for a folder outside the run: its checkpoint's hash, weights and architecture, else its path."""
    try:
        return compact.read_index(compact.find(source))["sha256"]
    except ValueError:
        return str(source)


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
