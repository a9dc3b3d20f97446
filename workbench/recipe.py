"""Recipe files: finding, reading, including, overriding. Light: no torch, no job is imported.

A recipe is an ordered mapping. An entry with a ``job`` is a stage; any other entry is an argument shared by every stage
whose job takes it and does not set it (mappings without a ``class_path``, such as ``trainer``, are merged key by key).
A value that ends in ``.yaml`` is replaced by the contents of that file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from workbench.jobs import Job, find_jobs

_SHARE = Path(__file__).parent / "share"
_ROOTS = (_SHARE, Path(__file__).parent.parent)


class RecipeError(ValueError):
    """A mistake in a recipe or on its command line: one message for a person, no stack."""


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a job and the arguments it was given, before they are checked against types."""

    name: str
    job: Job
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe file whose stages, jobs and keys are known to exist."""

    path: Path
    stages: tuple[Stage, ...]

    def error(self, message: str, stage: str | None = None, key: str | None = None) -> RecipeError:
        """A :class:`RecipeError` that says where: file, stage, key."""
        where = [str(self.path), *([f"stage '{stage}'"] if stage else []), *([f"key '{key}'"] if key else [])]
        return RecipeError(f"{', '.join(where)}: {message}")


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest of ``words``, else a list of them."""
    close = get_close_matches(str(word), words, 1, 0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; allowed: {', '.join(words)}" if words else ""


def recipes() -> dict[str, Path]:
    """Bundled recipes by name, the path below ``recipes/`` without its ending."""
    for root in _ROOTS:
        if (root / "recipes").is_dir():
            folder = root / "recipes"
            return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}
    return {}


def find(name: str) -> Path:
    """The recipe file at the path ``name``, or the bundled recipe of that name.

    Raises:
        RecipeError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name in known:
        return known[name]
    raise RecipeError(f"{name}: neither a file nor a bundled recipe{nearest(name, list(known))}")


def headline(path: Path) -> str:
    """What the recipe says of itself in the comment that it begins with: its first line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe, include its fragments, apply overrides, share shared arguments, check names.

    Args:
        path: The file.
        overrides: Dotted key and YAML text, such as ``("student.temperature", "2")``.

    Raises:
        RecipeError: On anything that is wrong with the file, its stages, jobs or their arguments' names.
    """
    content = _mapping(path)
    blank = Recipe(path, ())
    for key, text in overrides:
        _override(blank, content, key, text)
    content = {key: _included(blank, key, value) for key, value in content.items()}
    shared = {key: value for key, value in content.items() if not _is_stage(value)}
    jobs, stages = find_jobs(), []
    for name, body in content.items():
        if not _is_stage(body):
            continue
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise blank.error("a stage's name is a folder's name: letters, digits, '_' and '-' are allowed", name)
        if body["job"] not in jobs:
            raise blank.error(f"unknown job {body['job']!r}{nearest(body['job'], list(jobs))}", name, "job")
        job = jobs[body["job"]]
        own = {key: _included(blank, key, value, name) for key, value in body.items() if key != "job"}
        names = [parameter.name for parameter in job.parameters if parameter.name != "out"]
        for key in own:
            if key not in names:
                raise blank.error(f"job '{job.name}' has no such argument{nearest(key, names)}", name, str(key))
        given = {key: value for key, value in shared.items() if key in names}
        stages.append(Stage(name, job, {**given, **{key: _merged(given.get(key), own[key]) for key in own}}))
    if not stages:
        raise blank.error("no stage: a stage is a mapping with a job, e.g. 'teacher: {job: fit, ...}'")
    for key in shared:
        takers = [p.name for stage in stages for p in stage.job.parameters if p.name != "out"]
        if key not in takers:
            allowed = [*(stage.name for stage in stages), *dict.fromkeys(takers)]
            what = "neither a stage (it has no job) nor an argument that a stage's job takes"
            raise blank.error(f"{what}{nearest(key, allowed)}", key=str(key))
    return Recipe(path, tuple(stages))


def _is_stage(value: Any) -> bool:
    return isinstance(value, Mapping) and "job" in value


def _merged(shared: Any, own: Any) -> Any:
    plain = all(isinstance(value, Mapping) and "class_path" not in value for value in (shared, own))
    return {**shared, **own} if plain else own


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if content is None:
        raise RecipeError(f"{path}: the file is empty: a recipe is a mapping of stages")
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a mapping is expected, found a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _included(recipe: Recipe, key: str, value: Any, stage: str | None = None) -> Any:
    if not (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
        return value
    folder = recipe.path.parent
    places = [folder, *list(folder.parents)[:2], Path.cwd(), *_ROOTS]
    for place in places:
        if (place / value).is_file():
            return _mapping(place / value)
    raise recipe.error(f"no file '{value}' beside the recipe, above it or in {Path.cwd()}", stage, key)


def _override(recipe: Recipe, content: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key; inside a ``class_path`` mapping a name means one of its ``init_args``."""
    *path, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(path):
        if isinstance(node, dict) and depth == 0 and part not in node and part != "trainer":
            raise recipe.error(f"--{key}: no such stage{nearest(part, list(node))}", key=key)
        if "class_path" in node and part not in ("init_args", "dict_kwargs"):
            node = node.setdefault("init_args", {})
        child = _included(recipe, key, node.get(part)) if isinstance(node.get(part), str) else node.get(part)
        if child is not None and not isinstance(child, dict):
            raise recipe.error(f"--{key}: '{'.'.join(path[: depth + 1])}' is {child!r}, which has no keys", key=key)
        node[part] = child if child is not None else {}
        node = node[part]
    if "class_path" in node and last not in ("class_path", "init_args", "dict_kwargs"):
        node = node.setdefault("init_args", {})
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise recipe.error(f"--{key}: {text!r} is not a YAML value: {error}", key=key) from error
    node[last] = value


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
