"""Jobs: plain functions found by entry point and read without importing them."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "workbench.jobs"
REQUIRED = "required"
_OURS = "distill-prune"


@dataclass(frozen=True)
class Parameter:
    """An argument of a job as its source has it.

    Args:
        name: Its name.
        annotation: Source text of its type.
        default: Source text of its default; ``"required"`` if there is none.
        description: From the docstring's ``Args``.
    """

    name: str
    annotation: str
    default: str
    description: str


@dataclass(frozen=True)
class Job:
    """A job by the name that recipes give it.

    Its properties raise ValueError, with what to do, if there is no such function or it cannot be a job.
    """

    name: str
    entry: EntryPoint

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported."""
        try:
            return self.entry.load()
        except Exception as error:  # an import runs whatever the module does
            raise ValueError(f"{self}: cannot be imported: {type(error).__name__}: {error}") from error

    @cached_property
    def summary(self) -> str:
        """First line of the docstring."""
        return (ast.get_docstring(self._source) or "").partition("\n")[0]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The arguments that a recipe can give, in order, read from the source: all but ``out``, the stage's folder."""
        arguments = self._source.args
        described = _described(ast.get_docstring(self._source) or "")
        first: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
        pairs = [
            *zip(arguments.args, [*first, *arguments.defaults], strict=True),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ]
        return tuple(
            Parameter(
                argument.arg,
                ast.unparse(argument.annotation) if argument.annotation else "Any",
                ast.unparse(default) if default is not None else REQUIRED,
                described.get(argument.arg, ""),
            )
            for argument, default in pairs
            if argument.arg != "out"
        )

    @cached_property
    def _source(self) -> ast.FunctionDef:
        found = _defined(_parsed(self), self.entry.attr)
        if found is None:
            # Defined in another module than the one that offers it, so it has to be imported to be found.
            function = inspect.unwrap(self.function)
            try:
                found = _defined(ast.parse(textwrap.dedent(inspect.getsource(function))), function.__name__)
            except (AttributeError, OSError, SyntaxError, TypeError):
                found = None
        if found is None:
            raise ValueError(f"{self}: is not a plain function: a job is a 'def' at the top of a module")
        names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
        if found.args.posonlyargs or found.args.vararg or found.args.kwarg or "out" not in names:
            raise ValueError(
                f"{self}: a job takes named arguments, one of them 'out: Path', the stage's folder; "
                f"this one takes ({ast.unparse(found.args)})"
            )
        return found

    def __str__(self) -> str:
        return f"job '{self.name}' ({self.entry.value})"


def find_jobs() -> dict[str, Job]:
    """Installed jobs by name. Where two packages give one name, this project's counts, else the first on the path."""
    entries = sorted(entry_points(group=GROUP), key=lambda entry: entry.dist is None or entry.dist.name != _OURS)
    return {entry.name: Job(entry.name, entry) for entry in reversed(entries)}


def _parsed(job: Job) -> ast.Module:
    """The syntax tree of the module that offers ``job``."""
    try:
        spec = _spec(job.entry.module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        owner = f"; reinstall {job.entry.dist.name}, which offers it" if job.entry.dist else ""
        raise ValueError(f"{job}: there is no module '{job.entry.module}'{owner}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ast.Module([], [])
    try:
        return ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{job}: its source cannot be read: {error}") from error


def _spec(module: str) -> ModuleSpec | None:
    """Where ``module`` is. Unlike ``find_spec`` it imports no parent package, which may be slow to import."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    for depth in range(1, len(rest) + 1):
        if spec is None:
            return None
        name = ".".join([top, *rest[:depth]])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or ()))
    return spec


def _defined(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def _described(docstring: str) -> dict[str, str]:
    """Descriptions in the ``Args`` section of a Google-style docstring, by argument."""
    _, _, section = docstring.partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, text = line.strip().partition(":")
            name = name.partition(" ")[0]  # "name (type): ..." is the same name
            found[name] = text.strip()
        elif name:
            found[name] += " " + line.strip()
    return found
