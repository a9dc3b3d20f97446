"""The text of ``--help`` and of the listing, from recipes and the sources of jobs. Light: no torch."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workbench import yaml_io
from workbench.launcher.recipe import Recipe, headline, recipes
from workbench.launcher.signatures import REQUIRED, Parameter

_WIDEST = 100


def listing(program: str) -> str:
    """The bundled recipes, a line or two each."""
    paths = recipes()
    width = max((len(name) for name in paths), default=0)
    lines = [_wrap(headline(path), f"  {name:<{width}}  ", " " * (width + 4)) for name, path in paths.items()]
    head = "Bundled recipes:" if lines else "There are no bundled recipes."
    ways = {"Run one:": "NAME", "Its arguments:": "NAME --help", "Edit a copy:": "--copy NAME"}
    return "\n".join([head, "", *lines, "", *(f"{what:<16}{program} run {words}" for what, words in ways.items())])


def describe(recipe: Recipe) -> str:
    """The stages of a recipe and their arguments: type, value, description."""
    lines = [str(recipe.path)]
    if title := headline(recipe.path):
        lines += [_wrap(title)]
    for stage in recipe.stages:
        lines += ["", _wrap(f"{stage.name}: {stage.job.name}. {stage.job.summary}", later="  ")]
        lines += ["", *_arguments(stage.name, stage.job.parameters, stage.arguments)]
    return "\n".join(lines)


def metavar(annotation: str) -> str:
    """The source text of a type as one word, or the values that it allows: ``FLOAT``, ``{magnitude,random}``."""
    words: list[str] = []
    for node in _alternatives(ast.parse(annotation, mode="eval").body):
        words += [_word(node)] if _word(node) not in words else []
    return "|".join(words)


def _arguments(
    prefix: str, parameters: Sequence[Parameter], arguments: Mapping[str, Any], indent: str = "  "
) -> Iterator[str]:
    for parameter in parameters:
        head = f"{indent}--{prefix}.{parameter.name} {metavar(parameter.annotation)}"
        value = _value(arguments, parameter)
        line = f"{head}  ({value})" if value else head
        yield line if len(line) <= _width() else _wrap(line.replace(",", ", "), indent, f"{indent}      ")
        if parameter.description:
            yield _wrap(parameter.description, f"{indent}    ", f"{indent}    ")
        fields = arguments.get(parameter.name)
        if isinstance(fields, Mapping):
            fields = fields.get("init_args") if "class_path" in fields else fields
        nested = fields if isinstance(fields, Mapping) else {}
        yield from _arguments(f"{prefix}.{parameter.name}", parameter.fields, nested, f"{indent}  ")


def _value(arguments: Mapping[str, Any], parameter: Parameter) -> str:
    """The argument's value: what the recipe gives, else its default; empty if that is None."""
    if parameter.name in arguments:
        value = arguments[parameter.name]
        if isinstance(value, Mapping) and "class_path" in value:
            path = str(value["class_path"])
            return path if len(path) <= 36 else f"...{path[-33:]}"
        text = yaml_io.inline(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    if parameter.default == REQUIRED:
        return REQUIRED
    default = ast.parse(parameter.default, mode="eval").body
    parts = default.args if isinstance(default, ast.Call) else [default]
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    if len(values) < len(parts):
        return parameter.default
    # Duration(1, 'ep') is written 1ep, Path('x') is x.
    return "".join(map(str, values)) if isinstance(default, ast.Call) else _constant(values[0])


def _constant(value: object) -> str:
    return "" if value is None else yaml_io.inline(value)


def _alternatives(node: ast.expr) -> Iterator[ast.expr]:
    """The types in a union, without None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    elif isinstance(node, ast.Subscript) and _name(node.value) in ("Optional", "Union"):
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield from _alternatives(part)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _alternatives(ast.parse(node.value, mode="eval").body)
    elif not (isinstance(node, ast.Constant) and node.value is None):
        yield node


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        if _name(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return "{" + ",".join(str(ast.literal_eval(value)) for value in values) + "}"
        node = node.value
    return _name(node).removeprefix("Lightning").removesuffix("Callable").upper()


def _name(node: ast.expr) -> str:
    return (
        node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ast.unparse(node)
    )


def _without_markup(text: str) -> str:
    """The text of a docstring as a terminal shows it: ``:func:`a.b` `` is a.b."""
    return re.sub(r":[a-z]+:`~?([^`]+)`", r"\1", text).replace("``", "`")


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, _WIDEST), 40)


def _wrap(text: str, first: str = "", later: str = "") -> str:
    words = " ".join(_without_markup(text).split())
    return textwrap.fill(words, _width(), initial_indent=first, subsequent_indent=later, break_long_words=False)
