"""What is wrong with a job's arguments, in one line for a person; the parser explains it to programmers, at length.

jsonargparse reports a mistake anywhere inside a class as one of the outermost argument, with every type that it tried.
So each class in the arguments is checked by itself, the innermost first, until the one that is wrong is found.
"""

import copy
import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer

from workbench import yaml_io
from workbench.launcher.jobs import Parameter
from workbench.messages import nearest

_ENTRIES = ("class_path", "init_args", "dict_kwargs")
_LONGEST = 300
_ACCOUNT = (
    "Does not",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a",
    "Import path",
    "Problem with",
    "Parser key",
)


def explain(text: str, arguments: Mapping[str, Any], function: Callable[..., Any]) -> tuple[str | None, str]:
    """Key and message for the error ``text`` that the parser gave for ``arguments`` of ``function``."""
    blamed = match[1] if (match := re.search(r'Parser key "([^"]+)"', text)) else None
    for key, node in _classes(arguments, ""):
        if found := _class_fault(key, node, text if blamed is None or key.startswith(blamed) else ""):
            return found
    if unknown := re.search(r"Group 'trainer' does not accept option '([^']+)'", text):
        names = list(inspect.signature(Trainer).parameters)
        return f"trainer.{unknown[1]}", f"Lightning's Trainer has no such argument{nearest(unknown[1], names)}"
    for path, option in re.findall(r"class_path '([\w.]+)':\s+Option '([^']+)' is not accepted", text):
        if dataclasses.is_dataclass(cls := resolved(path)):
            names = [field.name for field in dataclasses.fields(cls)]
            key = next(_keys(_at(arguments, blamed), option, blamed or ""), blamed)
            return key, f"{getattr(cls, '__name__', path)} has no such argument{nearest(option, names)}"
    if required := _required(text):
        return required[0], f"is required by job '{function.__name__}' and not given"
    return blamed, _type_fault(text, _at(arguments, blamed))


def innermost(text: str) -> str:
    """What a constructor said, out of the parser's account of every type that it tried."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith(_ACCOUNT)]
    return said[0] if said else " ".join(lines)[:_LONGEST]


def wrongly_null(parameter: Parameter, given: Mapping[str, Any]) -> bool:
    """Whether null is given though neither type nor default is None: the parser lets it pass."""
    if parameter.name not in given or given[parameter.name] is not None:
        return False
    return parameter.default != "None" and not re.search(r"\b(None|Optional|Any)\b", parameter.annotation)


def _classes(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``class_path`` inside ``value`` and its dotted key, inner ones first."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _classes(item, f"{key}.{name}" if key else str(name))
        if "class_path" in value:
            yield key, dict(value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _classes(item, f"{key}[{index}]")


def _keys(value: Any, name: str, key: str) -> Iterator[str]:
    """Dotted keys of every entry called ``name`` inside ``value``, which is at ``key``."""
    for each, item in value.items() if isinstance(value, Mapping) else ():
        if each == name:
            yield f"{key}.{each}"
        yield from _keys(item, name, f"{key}.{each}")


def _class_fault(key: str, node: Mapping[str, Any], text: str) -> tuple[str, str] | None:
    """What is wrong with one class and its arguments, classes inside it aside; ``text`` is the parser's, if on it."""
    path, given = node["class_path"], {} if node.get("init_args") is None else node["init_args"]
    for name in node:
        if name not in _ENTRIES:
            return key, f"'{name}' stands beside class_path: arguments of the class go into init_args"
    if not isinstance(path, str) or not isinstance(given, Mapping):
        return key, "a class is given as {class_path: package.module.Class, init_args: {argument: value}}"
    if "." not in path:
        # The parser also knows classes by their bare names, of those that happen to be imported.
        return (key, f"no class '{path}' is known: give its full path, package.module.{path}") if path in text else None
    cls = resolved(path)
    if isinstance(cls, str):
        return f"{key}.class_path", cls
    if not callable(cls):
        return None
    parser = ArgumentParser(exit_on_error=False)
    try:
        if inspect.isclass(cls):
            parser.add_class_arguments(cls, fail_untyped=False)
        else:
            parser.add_function_arguments(cls, fail_untyped=False)
        parser.parse_object(copy.deepcopy(dict(given)))  # it makes objects inside what it parses
    except (ArgumentError, TypeError, ValueError) as error:
        return _init_fault(f"{key}.init_args", cls, given, str(error), text)
    if "does not correspond to a subclass of" in text and path in text:
        return f"{key}.class_path", _kinship(path, cls, text)
    return None


def _init_fault(
    key: str, cls: Callable[..., Any], given: Mapping[str, Any], own: str, text: str
) -> tuple[str, str] | None:
    if unknown := re.search(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", own):
        name = unknown[1] or unknown[2]
        names = [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]
        return f"{key}.{name}", f"{cls.__name__} has no such argument{nearest(name, names)}"
    if missing := _required(own):
        # What a callable is given when it is called, such as an optimizer its parameters, is not missing.
        wanted = [name for name in missing if name in _required(text)]
        return (f"{key}.{wanted[0]}", f"is required by {cls.__name__} and not given") if wanted else None
    if match := re.search(r'Parser key "([^"]+)"', own):
        return f"{key}.{match[1]}", _type_fault(own, _at(given, match[1]))
    return None


def resolved(path: str) -> Any:
    """What is at the dotted ``path``; text that says why nothing is."""
    module, _, name = path.rpartition(".")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            return f"importing {module} fails: {error}"
        parent, _, last = missing.rpartition(".")
        where = import_module(parent).__dict__.get("__path__", []) if parent else None
        names = [info.name for info in pkgutil.iter_modules(where)]
        close = nearest(last, names)
        return f"there is no module '{missing}'{close if 'mean' in close else ''}"
    except Exception as error:  # an import runs whatever the module does
        return f"importing {module} fails: {type(error).__name__}: {error}"
    if hasattr(found, name):
        return getattr(found, name)
    return f"module '{module}' has no '{name}'{nearest(name, [n for n in dir(found) if not n.startswith('_')])}"


def _kinship(path: str, cls: Any, text: str) -> str:
    """Why ``cls`` is refused where another kind of class is expected."""
    wanted = re.search(rf"{re.escape(path)} does not correspond to a subclass of (.+)", text)
    expected = types_said(wanted[1]) if wanted else "of the kind that is expected"
    if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in getattr(cls, "__mro__", ())):
        return (
            f"{cls.__name__} belongs to pytorch_lightning, recipes run on lightning.pytorch: "
            "take it from there, or change the import of its base class"
        )
    return f"{cls.__name__} is not a {expected}"


def _required(text: str) -> list[str]:
    match = re.search(r"arguments? (?:is|are) required: ([\w., ]+)", text)
    return match[1].split(", ") if match else []


def _type_fault(text: str, value: Any) -> str:
    """The parser's complaint about one value's type as 'is X: a Y is expected'."""
    if own := re.search(r"Not of type \w+: (.+)", text):
        return own[1]
    if isinstance(value, Mapping) and re.search(r"Option '[^']+' is not accepted", text):
        return "has no class_path: expected {class_path: package.module.Class, init_args: {argument: value}}"
    shown = f"is {_shown(value)}: expected"
    if subclass := re.search(r"Not a valid subclass of (\w+)", text):
        return f"{shown} a {subclass[1]}, as {{class_path: package.module.Class, init_args: {{...}}}}"
    types = re.search(r"Subtypes: \[(.*)\]\n", text) or re.search(r"Expected an? (.+?)(?:\. Got value|\n|$)", text)
    if types is None:
        lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("Parser key")]
        return " ".join(lines)[:_LONGEST]
    choices = [
        choice.strip("'\" ") for found in re.findall(r"Literal\[([^\]]*)\]", text) for choice in found.split(",")
    ]
    wrong = re.search(r"Got value: (.+)", text)
    hint = nearest(wrong[1] if wrong and choices else value, dict.fromkeys(choices)) if choices else ""
    return f"{shown} {types_said(types[1])}{hint if 'mean' in hint else ''}"


def types_said(text: str) -> str:
    """Types as the parser prints them, as a person says them."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " or "), text)
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "[(") - (char in "])")
        parts = [*parts, ""] if char == "," and depth == 0 else [*parts[:-1], parts[-1] + char]
    return " or ".join(part.strip() for part in parts)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml_io.inline(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _at(value: Any, key: str | None) -> Any:
    """The value at a dotted key."""
    for part in (key or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else value
    return value
