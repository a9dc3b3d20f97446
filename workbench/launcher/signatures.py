"""Signatures read from source: arguments of functions and fields of dataclasses, without importing their modules.

`--help` must not import torch, so names are resolved as Python would, in syntax trees: a class may be defined in the
module or imported from another one, through any number of packages. Only this project's packages and that of the job
are read: the classes of torch and lightning are no dataclasses, and their sources are long.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workbench.definitions import module_source

REQUIRED = "required"
_PACKAGES = ("workbench", "prune", "distill")
_DEPTH = 8  # of imports of imports


@dataclass(frozen=True)
class Parameter:
    """An argument of a job, or a field of a dataclass that is one, as the source has it.

    Args:
        name: Its name; ``NAME.field`` for a field of a dataclass that is an entry of a mapping.
        annotation: Source text of its type.
        default: Source text of its default; ``"required"`` if there is none.
        description: Its entry in the docstring's ``Args``.
        fields: If its type is, or may be, a dataclass: the fields.
    """

    name: str
    annotation: str
    default: str
    description: str
    fields: "tuple[Parameter, ...]" = ()


def find_function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function called ``name`` at the top of a module."""
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def parameters_of(function: ast.FunctionDef, module: str) -> tuple[Parameter, ...]:
    """The arguments of a function that is defined in ``module``, in order."""
    arguments = function.args
    first: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    pairs = [
        *zip(arguments.args, [*first, *arguments.defaults], strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    reader = _Reader(module)
    described = _argument_descriptions(ast.get_docstring(function) or "")
    return tuple(
        reader.parameter(argument.arg, argument.annotation, default, described, module) for argument, default in pairs
    )


class _Reader:
    """Resolves the names of types, starting in one module.

    Args:
        module: The module's name.
    """

    def __init__(self, module: str) -> None:
        self._packages = {*_PACKAGES, module.partition(".")[0]}
        self._trees: dict[str, ast.Module] = {}

    def parameter(
        self,
        name: str,
        annotation: ast.expr | None,
        default: ast.expr | None,
        described: dict[str, str],
        module: str,
        outer: tuple[str, ...] = (),
    ) -> Parameter:
        """A parameter, or a field, with the fields of its type."""
        text = ast.unparse(_Aliases(self, module).visit(annotation)) if annotation else "Any"
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return Parameter(
            name,
            text,
            ast.unparse(default) if default is not None else REQUIRED,
            described.get(name, ""),
            tuple(self._fields(annotation, module, outer)) if annotation else (),
        )

    def _fields(self, annotation: ast.expr, module: str, outer: tuple[str, ...]) -> Iterator[Parameter]:
        """The fields of every dataclass that a value of this type may be, inside the dataclasses ``outer``."""
        for name, prefix in _classes(annotation):
            where, node = self.definition(module, name)
            if name in outer or not isinstance(node, ast.ClassDef) or not any(map(_is_dataclass, node.decorator_list)):
                continue
            described = _argument_descriptions(ast.get_docstring(node) or "")
            for entry in node.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    kind, default = ast.unparse(entry.annotation), _default(entry.value)
                    if kind.rpartition(".")[2] == "KW_ONLY" or "ClassVar" in kind or default is _NOT_AN_ARGUMENT:
                        continue
                    field = self.parameter(entry.target.id, entry.annotation, default, described, where, (*outer, name))
                    yield Parameter(
                        prefix + field.name, field.annotation, field.default, field.description, field.fields
                    )

    def definition(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST | None]:
        """Where ``name``, as used in ``module``, is defined: the module and the class or the value assigned to it."""
        for node in _top_level(self._tree(module)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node.value
            if isinstance(node, ast.ImportFrom) and depth < _DEPTH and not node.level and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.definition(node.module, alias.name, depth + 1)
        return module, None

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.Module([], [])
            if module.partition(".")[0] in self._packages:
                try:
                    source = module_source(module)
                    if source is not None:
                        self._trees[module] = ast.parse(Path(source).read_bytes(), source)
                except (OSError, SyntaxError, ValueError):
                    pass  # help must not fail because of a module that running the job will report
        return self._trees[module]


class _Aliases(ast.NodeTransformer):
    """Replaces the name of a ``Literal`` by its definition: help lists its values."""

    def __init__(self, reader: _Reader, module: str) -> None:
        self._reader, self._module = reader, module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The ``Literal`` of that name, or the name."""
        _, value = self._reader.definition(self._module, node.id)
        is_literal = isinstance(value, ast.Subscript) and ast.unparse(value.value).rpartition(".")[2] == "Literal"
        return value if isinstance(value, ast.Subscript) and is_literal else node


_NOT_AN_ARGUMENT = ast.Constant(...)


def _default(value: ast.expr | None) -> ast.expr | None:
    """The default of a dataclass's field; None if the field is required."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field"):
        return value
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    if isinstance(init := keywords.get("init"), ast.Constant) and init.value is False:
        return _NOT_AN_ARGUMENT
    if factory := keywords.get("default_factory"):
        return factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
    return keywords.get("default")


def _is_dataclass(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function).rpartition(".")[2] == "dataclass"


def _classes(annotation: ast.expr) -> Iterator[tuple[str, str]]:
    """Names of the classes in a union, and ``NAME.`` for those that are the values of a mapping by name."""
    if isinstance(annotation, ast.Name):
        yield annotation.id, ""
    elif isinstance(annotation, ast.BinOp):
        yield from _classes(annotation.left)
        yield from _classes(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        kind = ast.unparse(annotation.value).rpartition(".")[2]
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if kind in ("Optional", "Union"):
            for part in parts:
                yield from _classes(part)
        elif kind in ("dict", "Mapping") and len(parts) == 2 and isinstance(parts[1], ast.Name):
            yield parts[1].id, "NAME."


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements at the top of a module, those in ``if TYPE_CHECKING:`` too."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):
            yield from node.body


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """Descriptions in the ``Args`` section of a Google-style docstring, by argument."""
    _, _, section = docstring.partition("Args:\n")
    descriptions: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, text = line.strip().partition(":")
            name = name.partition(" ")[0]  # "name (type): ..." is the same name
            descriptions[name] = text.strip()
        elif name:
            descriptions[name] += " " + line.strip()
    return descriptions
