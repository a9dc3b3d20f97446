"""Recipe files: finding, reading, including, overriding. Light: no torch, no job is imported.

A recipe is an ordered mapping. An entry with a ``job`` is a stage; any other entry is an argument that stages share.
:func:`read` makes a `Recipe` of it, in this order:

1. **file**: the YAML is read as plain data; a key given twice is an error.
2. **include**: an entry that is text ending in ``.yaml`` is replaced by the content of that file, a fragment.
3. **override**: ``--student.temperature 2`` of the command line sets a dotted key. What it sets may be a fragment too.
4. **share**: each stage gets the shared arguments that its job takes and that it does not give itself. Mappings without
   a ``class_path``, such as ``trainer``, are merged key by key. A stage with ``start`` gets none: it inherits the
   arguments of the stage it starts from.
5. **grid**: a job with the arguments ``run: Runs`` and ``over`` is a sweep: the stage under ``run`` is repeated for
   each point of the grid ``over``, each a separate `Stage`.
6. **check**: stages, jobs and the names of their arguments exist. Values are checked later, by `arguments`, because the
   types of a job's arguments are known only when the job is imported, and with it torch.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench import yaml_io
from workbench.launcher.grid import Setting, settings
from workbench.launcher.jobs import Job, find_jobs
from workbench.launcher.signatures import REQUIRED
from workbench.messages import nearest

_SHARE = Path(__file__).parents[1] / "share"
_ROOTS = (_SHARE, Path(__file__).parents[2])
ENDINGS = (".yaml", ".yml")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Lightning 2.6's LightningCLI writes this entry, as null, into every config: no job needs to take it.
_LIGHTNING_CLI_ONLY = "weights_only"
# A job that reads the records of all stages above it, so that repeating it makes no sense.
_READS_ALL_STAGES = "report"

RUN, OVER = "run", "over"
"""The arguments that make a stage a sweep: the stage to repeat, and the grid."""

REPLACED = "replaced"
"""The folder, beside the stages' own, that stages made with other arguments are moved into."""


class RecipeError(ValueError):
    """A mistake in a recipe or on its command line: one message for a person, no stack."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a job and the arguments it was given, before they are checked against types.

    Args:
        name: Its key in the recipe; ``sweep/run`` for a run of a sweep.
        job: The job.
        arguments: Its arguments as given, with those that stages share.
        runs: The runs of a sweep; empty for any other stage.
        over: A run's point of the grid: values by dotted key.
    """

    name: str
    job: Job
    arguments: dict[str, Any]
    runs: "tuple[Stage, ...]" = ()
    over: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe file whose stages, jobs and keys are known to exist."""

    path: Path
    stages: tuple[Stage, ...]

    def error(self, message: str, stage: str | None = None, key: str | None = None) -> RecipeError:
        """A :class:`RecipeError` with its place: file, stage, key."""
        where = [str(self.path), *([f"stage '{stage}'"] if stage else []), *([f"key '{key}'"] if key else [])]
        return RecipeError(f"{', '.join(where)}: {message}")


def recipes() -> dict[str, Path]:
    """Bundled recipes by name, the path below ``recipes/`` without its ending."""
    folder = next((root / "recipes" for root in _ROOTS if (root / "recipes").is_dir()), None)
    if folder is None:
        return {}
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(name: str) -> Path:
    """The recipe file at the path ``name``, or the bundled recipe of that name.

    Raises:
        RecipeError: If there is neither.
    """
    if _is_file(Path(name)):
        return Path(name)
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    if _is_folder(Path(name)):
        inside = [str(path) for path in sorted(Path(name).glob("*.y*ml"))]
        raise RecipeError(
            f"{name}: is a folder, a recipe is a file" + (f": one of {', '.join(inside)}" if inside else "")
        )
    if name.endswith(".py"):
        raise RecipeError(f"{name}: a recipe is a YAML file; 'fabric run' starts scripts")
    candidates = [*shipped, *_yaml_files_beside(Path(name))]
    raise RecipeError(f"{name}: neither a file nor a bundled recipe{nearest(name, candidates)}")


def headline(path: Path) -> str:
    """The first line of a recipe if it is a comment, which describes the recipe."""
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe: include its fragments, apply overrides, share arguments, expand grids, check names.

    Args:
        path: The file.
        overrides: Dotted key and YAML text, such as ``("student.temperature", "2")``.

    Raises:
        RecipeError: On anything that is wrong with the file, its stages, jobs or their arguments' names.
    """
    blank = Recipe(path, ())  # for its error messages
    content = {key: _include(blank, value, key=key) for key, value in load_mapping(path).items()}
    for key, text in overrides:
        _override(blank, content, key, text)
    content = {key: _include(blank, value, key=key) for key, value in content.items()}  # what overrides name
    shared = {key: value for key, value in content.items() if not is_stage(value)}
    stages = [_stage(blank, name, body, shared) for name, body in content.items() if is_stage(body)]
    if not stages:
        raise blank.error("has no stage: a stage is a mapping with a job, e.g. 'teacher: {job: fit, ...}'")
    jobs = [part.job for stage in stages for part in (stage, *stage.runs[:1])]
    parameters = dict.fromkeys(parameter.name for job in jobs for parameter in job.parameters)
    for key, value in shared.items():
        # `teacher` is an argument of distill and a likely stage. If all its keys are arguments, a job was forgotten.
        lacks_job = isinstance(value, Mapping) and bool(value) and parameters.keys() >= set(value)
        if key not in parameters or lacks_job:
            names = dict.fromkeys([*(stage.name for stage in stages), *parameters])
            what = "neither a stage (it has no job) nor an argument that a stage's job takes"
            raise blank.error(what if lacks_job else f"{what}{nearest(key, names)}", key=key)
    return Recipe(path, tuple(stages))


def _stage(recipe: Recipe, name: str, body: Mapping[str, Any], shared: Mapping[str, Any]) -> Stage:
    """The stage called ``name``: its job resolved, its keys checked, fragments included, shared arguments added."""
    if not _STAGE_NAME.fullmatch(name) or name == REPLACED:
        raise recipe.error(f"the name is a folder's: letters, digits, '_' and '-', and not '{REPLACED}'", name)
    job, arguments = _read_stage_body(recipe, name, body, shared)
    return _with_runs(recipe, Stage(name, job, arguments), shared) if _is_sweep(job) else Stage(name, job, arguments)


def _read_stage_body(
    recipe: Recipe,
    name: str,
    body: Mapping[str, Any],
    shared: Mapping[str, Any],
    *,
    prefix: str = "",
    inherits: bool = False,
) -> tuple[Job, dict[str, Any]]:
    """The job of a stage's ``body`` and its arguments with the shared ones.

    Args:
        recipe: For error messages.
        name: The stage's name.
        body: The job and the arguments that the stage gives.
        shared: The recipe's shared arguments.
        prefix: ``run.`` if the body is the stage that a sweep repeats.
        inherits: The stage takes no shared arguments, as its grid gives it a ``start``.
    """
    jobs = find_jobs()
    job = jobs.get(str(body["job"]))
    if job is None:
        raise recipe.error(f"unknown job {body['job']!r}{nearest(body['job'], jobs)}", name, f"{prefix}job")
    try:
        names = [parameter.name for parameter in job.parameters]
    except ValueError as error:
        raise recipe.error(str(error), name, f"{prefix}job") from error
    own = {str(key): _include(recipe, value, name, f"{prefix}{key}") for key, value in body.items() if key != "job"}
    if own.get(_LIGHTNING_CLI_ONLY, 0) is None and _LIGHTNING_CLI_ONLY not in names:
        del own[_LIGHTNING_CLI_ONLY]
    for key in own:
        if key == "out":
            raise recipe.error("the stage's folder is set for all stages at once, by --out", name, f"{prefix}{key}")
        if key not in names:
            raise recipe.error(f"job '{job.name}' has no such argument{nearest(key, names)}", name, f"{prefix}{key}")
    # A stage that starts from another one inherits that one's arguments: a shared trainer must not replace its trainer.
    inherits = inherits or "start" in own
    defaults = {key: value for key, value in shared.items() if key in names and not inherits}
    merged = {**defaults, **{key: _merge(defaults.get(key), value) for key, value in own.items()}}
    return job, copy.deepcopy(merged)


def _is_sweep(job: Job) -> bool:
    return {RUN: "Runs"}.items() <= {parameter.name: parameter.annotation for parameter in job.parameters}.items()


def _with_runs(recipe: Recipe, stage: Stage, shared: Mapping[str, Any]) -> Stage:
    """The stage with its runs: the one under ``run``, repeated over the grid."""
    for key in (RUN, OVER):
        if key not in stage.arguments:
            raise recipe.error(f"is {REQUIRED} by job '{stage.job.name}' and not given", stage.name, key)
    body = stage.arguments[RUN]
    if not is_stage(body):
        raise recipe.error("is the stage to repeat: expected {job: fit, ...}", stage.name, RUN)
    try:
        points = settings(stage.arguments[OVER])
    except ValueError as error:
        raise recipe.error(str(error), stage.name, OVER) from error
    inherits = any("start" in point.values for point in points)
    job, arguments = _read_stage_body(recipe, stage.name, body, shared, prefix=f"{RUN}.", inherits=inherits)
    if _is_sweep(job) or job.name == _READS_ALL_STAGES:
        nested, reader = "a sweep in a sweep: name all keys in one", "it looks at all stages: give it its own"
        reason = nested if _is_sweep(job) else reader
        raise recipe.error(f"job '{job.name}' cannot be repeated, {reason}", stage.name, f"{RUN}.job")
    runs = tuple(_run_at(recipe, stage.name, job, arguments, point) for point in points)
    return Stage(stage.name, stage.job, {**stage.arguments, RUN: {"job": job.name, **arguments}}, runs)


def _run_at(recipe: Recipe, sweep: str, job: Job, shared: Mapping[str, Any], point: Setting) -> Stage:
    """The run of the stage ``sweep`` at one point of its grid."""
    arguments = copy.deepcopy(dict(shared))
    names = [parameter.name for parameter in job.parameters]
    for key, value in point.values.items():
        path = key.split(".")
        where = f"{OVER}.{key}"
        if path[0] == "seed" and "seed" not in names:
            path[0] = "seed_everything"
        if path[0] not in names or not all(path):
            hint = nearest(path[0], names)
            raise recipe.error(f"job '{job.name}' has no such argument{hint}", sweep, where)

        def error(message: str, where: str = where) -> RecipeError:
            return recipe.error(message, sweep, where)

        _set_value(recipe, arguments, path, copy.deepcopy(_include(recipe, value, sweep, where)), error)
    return Stage(f"{sweep}/{point.name}", job, arguments, over=point.values)


def is_stage(value: Any) -> bool:
    """Whether an entry of a recipe is a stage: a mapping with a job."""
    return isinstance(value, Mapping) and "job" in value


def _merge(shared: Any, own: Any) -> Any:
    plain = all(isinstance(value, Mapping) and "class_path" not in value for value in (shared, own))
    return {**shared, **own} if plain else own


def load_mapping(path: Path) -> dict[str, Any]:
    """The content of a recipe or a fragment, its keys as text.

    Raises:
        RecipeError: If the file cannot be read or is not a YAML mapping.
    """
    try:
        content = yaml_io.load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise RecipeError(f"{path}, {error}" if str(error).startswith("line") else f"{path}: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if content is None:
        raise RecipeError(f"{path}: the file is empty: a mapping is expected, e.g. 'teacher: {{job: fit, ...}}'")
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a mapping is expected, found {_kind(content)}")
    return {str(key): value for key, value in content.items()}


def _include(recipe: Recipe, value: Any, stage: str | None = None, key: str | None = None) -> Any:
    """``value``, or the contents of the file that it names."""
    if not (isinstance(value, str) and value.endswith(ENDINGS)):
        return value
    path = find_fragment(recipe.path, value)
    if path is None:
        names = [name for candidate in _candidates(recipe.path, value) for name in _yaml_files_beside(candidate)]
        hint = nearest(Path(value).name, dict.fromkeys(Path(name).name for name in names))
        raise recipe.error(f"no file '{value}' beside the recipe, above it or in {Path.cwd()}{hint}", stage, key)
    try:
        return load_mapping(path)
    except RecipeError as error:
        raise recipe.error(f"fragment {error}", stage, key) from error


def find_fragment(recipe: Path, value: str) -> Path | None:
    """The file that the text ``value`` in the file ``recipe`` includes; None if there is none."""
    return next((path for path in _candidates(recipe, value) if _is_file(path)), None)


def _candidates(recipe: Path, value: str) -> Iterator[Path]:
    """Where a fragment may be: beside the recipe, one or two folders above, here, and with this package."""
    folder = recipe.resolve().parent
    return (parent / value for parent in (folder, *folder.parents[:2], Path.cwd(), *_ROOTS))


def _yaml_files_beside(path: Path) -> list[str]:
    """YAML files in the folder of ``path``."""
    folder = path.parent
    return [str(file) for file in sorted(folder.glob("[!.]*.y*ml"))] if _is_folder(folder) else []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _override(recipe: Recipe, content: dict[str, Any], key: str, text: str) -> None:
    """Set the dotted ``key``; inside a mapping with a ``class_path`` a name is that of an entry of ``init_args``."""
    *path, last = key.split(".")
    if not all([*path, last]):
        raise RecipeError(f"--{key}: write --stage.argument value")
    try:
        value = yaml_io.load(text)
    except ValueError as error:
        raise RecipeError(f"--{key}: {text!r} is {error}") from error
    if path and path[0] not in content and path[0] != "trainer":
        raise recipe.error(f"--{key}: no such stage or shared argument{nearest(path[0], content)}")
    _set_value(recipe, content, [*path, last], value, lambda message: recipe.error(f"--{key}: {message}"), content)


def _set_value(
    recipe: Recipe,
    node: Any,
    keys: Sequence[str],
    value: Any,
    error: Callable[[str], RecipeError],
    shared: Mapping[str, Any] | None = None,
) -> None:
    """Set the value at ``keys`` inside ``node``. A stage first gets its own copy of the shared argument in question."""
    *path, last = keys
    for depth, part in enumerate(path):
        node = _arguments_of(node, part)
        if part not in node and shared and part in shared and is_stage(node) and not is_stage(shared[part]):
            node[part] = copy.deepcopy(shared[part])
        node[part] = _include(recipe, node.get(part), key=".".join(keys))
        if node[part] is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            inside = ".".join([*path[depth + 1 :], last])
            raise error(
                f"{'.'.join(path[: depth + 1])} is {yaml_io.inline(node[part])}, which has no keys: "
                f"give a mapping, {{{inside}: ...}}, instead"
            )
        node = node[part]
    _arguments_of(node, last)[last] = value


def _arguments_of(node: dict[str, Any], name: str) -> dict[str, Any]:
    if "class_path" not in node or name in ("class_path", "init_args", "dict_kwargs"):
        return node
    if not isinstance(node.get("init_args"), dict):
        node["init_args"] = {}
    return node["init_args"]


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the text {value!r}" if isinstance(value, str) else repr(value)
