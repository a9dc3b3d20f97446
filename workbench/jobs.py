"""Jobs: plain functions found by entry point and read without importing them."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "workbench.jobs"
REQUIRED = "required"


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
    """A job by the name that recipes give it."""

    name: str
    entry: EntryPoint

    @cached_property
    def function(self) -> Callable[..., dict[str, Any]]:
        """The function itself, imported."""
        return self.entry.load()

    @cached_property
    def summary(self) -> str:
        """First line of the docstring."""
        return (ast.get_docstring(self._source) or "").partition("\n")[0]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The arguments in order, read from the source."""
        arguments = self._source.args
        described = _described(ast.get_docstring(self._source) or "")
        positional = [*arguments.posonlyargs, *arguments.args]
        missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
        pairs = [
            *zip(positional, [*missing, *arguments.defaults], strict=True),
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
        )

    @cached_property
    def _source(self) -> ast.FunctionDef:
        # find_spec imports the parent packages only, and those of this project are light.
        spec = find_spec(self.entry.module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == self.entry.attr:
                return node
        # Not a plain function of that module: made elsewhere, so it has to be imported.
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(self.function)))
        node = ast.parse(text).body[0]
        if not isinstance(node, ast.FunctionDef):
            raise ValueError(f"job '{self.name}' ({self.entry.value}) is not a function: a job is a plain function")
        return node


def find_jobs() -> dict[str, Job]:
    """Installed jobs by name; this project's first."""
    entries = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return {entry.name: Job(entry.name, entry) for entry in entries}


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
            found[name] = text.strip()
        elif name:
            found[name] += " " + line.strip()
    return found
