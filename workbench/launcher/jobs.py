"""Jobs: plain functions found by entry point (``workbench.jobs``) and read without importing them.

A job's module imports torch, which takes seconds. So `--help` and the listing parse the module's source: the signature
gives the arguments, the docstring their descriptions. A dataclass as the type of an argument is read the same way.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from workbench.definitions import module_source
from workbench.launcher.signatures import Parameter, find_function, parameters_of

GROUP = "workbench.jobs"
_DISTRIBUTION = "distill-prune"


@dataclass(frozen=True)
class Job:
    """A job by its name in recipes.

    Its properties raise ValueError, with what to do, if there is no such function or it cannot be a job.
    """

    name: str
    entry: EntryPoint

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported."""
        try:
            return self.entry.load()
        except Exception as error:  # an import runs any code
            raise ValueError(f"{self}: cannot be imported: {type(error).__name__}: {error}") from error

    @cached_property
    def summary(self) -> str:
        """First line of the docstring."""
        return (ast.get_docstring(self._source) or "").partition("\n")[0]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The arguments that a recipe can give, in order, read from the source: all but ``out``, the stage's folder."""
        return tuple(item for item in parameters_of(self._source, self.entry.module) if item.name != "out")

    @cached_property
    def _source(self) -> ast.FunctionDef:
        definition = find_function(_parse_module(self), self.entry.attr)
        if definition is None:
            # The module that offers the job does not define it: only importing it can tell which one does.
            function = inspect.unwrap(self.function)
            try:
                source = textwrap.dedent(inspect.getsource(function))
                definition = find_function(ast.parse(source), function.__name__)
            except (AttributeError, OSError, SyntaxError, TypeError):
                definition = None
        if definition is None:
            raise ValueError(f"{self}: is not a plain function: a job is a 'def' at the top of a module")
        names = [argument.arg for argument in (*definition.args.args, *definition.args.kwonlyargs)]
        if definition.args.posonlyargs or definition.args.vararg or definition.args.kwarg or "out" not in names:
            raise ValueError(
                f"{self}: a job takes named arguments, one of them 'out: Path', the stage's folder; "
                f"this one takes ({ast.unparse(definition.args)})"
            )
        return definition

    def __str__(self) -> str:
        return f"job '{self.name}' ({self.entry.value})"


def find_jobs() -> dict[str, Job]:
    """Installed jobs by name. Where two packages give one name, this project's counts, else the first on the path."""
    entries = sorted(
        entry_points(group=GROUP), key=lambda entry: entry.dist is None or entry.dist.name != _DISTRIBUTION
    )
    return {entry.name: Job(entry.name, entry) for entry in reversed(entries)}


def _parse_module(job: Job) -> ast.Module:
    """The syntax tree of the module that offers ``job``."""
    try:
        source = module_source(job.entry.module)
    except ValueError as error:
        owner = f"; reinstall {job.entry.dist.name}, which offers it" if job.entry.dist else ""
        raise ValueError(f"{job}: {error}{owner}") from error
    if source is None:
        return ast.Module([], [])
    try:
        return ast.parse(Path(source).read_bytes(), source)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{job}: its source cannot be read: {error}") from error
