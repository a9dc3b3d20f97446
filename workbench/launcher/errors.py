"""Error messages for wrong arguments of a job: one line, with the dotted key, from jsonargparse's many lines.

jsonargparse reports a mistake anywhere inside a class as a mistake in the outermost argument, with every type that it
tried. So each class and each dataclass in the arguments is checked by itself, the innermost first, until the wrong one
is found.
"""

import copy
import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer

from workbench import yaml_io
from workbench.launcher.signatures import Parameter
from workbench.messages import nearest

_ENTRIES = ("class_path", "init_args", "dict_kwargs")
_LONGEST = 300
_PARSER_LINES = (
    "Does not",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a",
    "Import path",
    "Problem with",
    "Parser key",
)


def dataclass_error(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """Dotted key and message for the first dataclass in ``arguments``, inner ones first, with a wrong field.

    jsonargparse would take a dataclass in a union, as `int | Levels`, for one type of several that do not fit.
    """
    hints = _hints(function)
    for name, value in arguments.items():
        if dataclasses.is_dataclass(cls := hints.get(name)) and not isinstance(value, Mapping) and value is not None:
            return name, f"is {_quoted(value)}: expected {_with_fields(cls)}"
        for key, cls, fields in _dataclasses(hints.get(name), value, name):
            for field in dataclasses.fields(cls):
                if field.name in fields and fields[field.name] is None and not _may_be_none(cls, field):
                    return f"{key}.{field.name}", f"is null: expected {readable_types(str(_hints(cls)[field.name]))}"
            parser = ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(cls, fail_untyped=False)
            try:
                parser.parse_object(copy.deepcopy(dict(fields)))  # it replaces parts of its input by objects
            except (ArgumentError, TypeError, ValueError) as error:
                # `describe_error` reports more about a class inside the dataclass.
                if not any(True for _ in _classes(fields, "")) and (wrong := _init_error(key, cls, fields, str(error))):
                    return wrong
    return None


def describe_error(text: str, arguments: Mapping[str, Any], function: Callable[..., Any]) -> tuple[str | None, str]:
    """Dotted key and message for the error ``text`` that jsonargparse raised for ``arguments`` of ``function``."""
    blamed = match[1] if (match := re.search(r'Parser key "([^"]+)"', text)) else None
    for key, node in _classes(arguments, ""):
        if error := _class_error(key, node, text if blamed is None or key.startswith(blamed) else ""):
            return error
    if unknown := re.search(r"Group 'trainer' does not accept option '([^']+)'", text):
        names = list(inspect.signature(Trainer).parameters)
        return f"trainer.{unknown[1]}", f"Lightning's Trainer has no such argument{nearest(unknown[1], names)}"
    if required := _missing_arguments(text):
        return required[0], f"is required by job '{function.__name__}' and not given"
    message = _type_error(text, _value_at(arguments, blamed))
    for cls in _types(_hints(function).get(blamed or "")):
        if dataclasses.is_dataclass(cls):
            message = re.sub(rf"\b{getattr(cls, '__name__', '')}\b", _with_fields(cls), message)
    return blamed, message


def constructor_message(text: str) -> str:
    """The message of the exception that a constructor raised, from the text that jsonargparse puts around it."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    messages = [line for line in lines if line and not line.startswith(_PARSER_LINES)]
    return messages[0] if messages else " ".join(lines)[:_LONGEST]


def is_wrongly_null(parameter: Parameter, arguments: Mapping[str, Any]) -> bool:
    """Whether null is given although neither type nor default is None, which jsonargparse accepts."""
    if parameter.name not in arguments or arguments[parameter.name] is not None:
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


def _dataclasses(hint: Any, value: Any, key: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Key, class and fields of every dataclass that is given as a mapping in ``value``, inner ones first."""
    if not isinstance(value, Mapping) or "class_path" in value:
        return
    if get_origin(hint) in (dict, Mapping) and len(types := get_args(hint)) == 2:
        for name, item in value.items():
            yield from _dataclasses(types[1], item, f"{key}.{name}")
    for alternative in _types(hint):
        if alternative is not hint and not dataclasses.is_dataclass(alternative):
            yield from _dataclasses(alternative, value, key)
        elif dataclasses.is_dataclass(alternative):
            hints = _hints(alternative)
            for name, item in value.items():
                yield from _dataclasses(hints.get(name), item, f"{key}.{name}")
            yield key, alternative, value


def _hints(annotated: Any) -> dict[str, Any]:
    try:
        return get_type_hints(annotated)
    except Exception:  # a name that only type checkers know
        return {}


def _may_be_none(cls: Any, field: dataclasses.Field[Any]) -> bool:
    hint = _hints(cls).get(field.name, Any)
    return field.default is None or hint is Any or type(None) in _types(hint)


def _with_fields(cls: Any) -> str:
    """A dataclass with its fields, for a message: ``Levels {count, rate}``."""
    return f"{cls.__name__} {{{', '.join(field.name for field in dataclasses.fields(cls) if field.init)}}}"


def _types(hint: Any) -> tuple[Any, ...]:
    """The types in a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _class_error(key: str, node: Mapping[str, Any], text: str) -> tuple[str, str] | None:
    """Key and message if a class or its own arguments are wrong; ``text`` is the parser's, if it is about this key."""
    path, init_args = node["class_path"], {} if node.get("init_args") is None else node["init_args"]
    for name in node:
        if name not in _ENTRIES:
            return key, f"'{name}' is beside class_path: arguments of the class go into init_args"
    if not isinstance(path, str) or not isinstance(init_args, Mapping):
        return key, "a class is given as {class_path: package.module.Class, init_args: {argument: value}}"
    if "." not in path:
        # jsonargparse also accepts a bare name if such a class happens to be imported: a recipe must not depend on it.
        return (key, f"no class '{path}' is known: give its full path, package.module.{path}") if path in text else None
    cls = import_object(path)
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
        parser.parse_object(copy.deepcopy(dict(init_args)))  # it replaces parts of its input by objects
    except (ArgumentError, TypeError, ValueError) as error:
        return _init_error(f"{key}.init_args", cls, init_args, str(error), text)
    if "does not correspond to a subclass of" in text and path in text:
        return f"{key}.class_path", _base_class_error(path, cls, text)
    return None


def _init_error(
    key: str, cls: Callable[..., Any], init_args: Mapping[str, Any], own: str, text: str | None = None
) -> tuple[str, str] | None:
    if unknown := re.search(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", own):
        name = unknown[1] or unknown[2]
        names = [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]
        return f"{key}.{name}", f"{cls.__name__} has no such argument{nearest(name, names)}"
    if missing := _missing_arguments(own):
        # An optimizer gets its parameters when it is called: only what the outer parser misses too is missing.
        wanted = [name for name in missing if text is None or name in _missing_arguments(text)]
        return (f"{key}.{wanted[0]}", f"is required by {cls.__name__} and not given") if wanted else None
    if match := re.search(r'Parser key "([^"]+)"', own):
        return f"{key}.{match[1]}", _type_error(own, _value_at(init_args, match[1]))
    return None


def import_object(path: str) -> Any:
    """The object at the dotted ``path``; if there is none, the reason as text."""
    module, _, name = path.rpartition(".")
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            return f"importing {module} fails: {error}"
        parent, _, last = missing.rpartition(".")
        where = import_module(parent).__dict__.get("__path__", []) if parent else None
        names = [info.name for info in pkgutil.iter_modules(where)]
        close = nearest(last, names)
        return f"there is no module '{missing}'{close if 'mean' in close else ''}"
    except Exception as error:  # an import runs any code
        return f"importing {module} fails: {type(error).__name__}: {error}"
    if hasattr(imported, name):
        return getattr(imported, name)
    return f"module '{module}' has no '{name}'{nearest(name, [n for n in dir(imported) if not n.startswith('_')])}"


def _base_class_error(path: str, cls: Any, text: str) -> str:
    """The message for a ``cls`` that is no subclass of the expected class."""
    wanted = re.search(rf"{re.escape(path)} does not correspond to a subclass of (.+)", text)
    expected = readable_types(wanted[1]) if wanted else "of the kind that is expected"
    if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in getattr(cls, "__mro__", ())):
        return (
            f"{cls.__name__} belongs to pytorch_lightning, recipes run on lightning.pytorch: "
            "take it from there, or change the import of its base class"
        )
    return f"{cls.__name__} is not a {expected}"


def _missing_arguments(text: str) -> list[str]:
    match = re.search(r"arguments? (?:is|are) required: ([\w., ]+)", text)
    return match[1].split(", ") if match else []


def _type_error(text: str, value: Any) -> str:
    """The parser's message about the type of ``value``, in the form 'is X: expected Y'."""
    if own := re.search(r"Not of type \w+: (.+)", text):
        return own[1]
    if isinstance(value, Mapping) and re.search(r"Option '[^']+' is not accepted", text):
        return "has no class_path: expected {class_path: package.module.Class, init_args: {argument: value}}"
    shown = f"is {_quoted(value)}: expected"
    if (subclass := re.search(r"Not a valid subclass of (\w+)", text)) and not isinstance(value, list):
        return f"{shown} a {subclass[1]}, as {{class_path: package.module.Class, init_args: {{...}}}}"
    types = re.search(r"Subtypes: \[(.*)\]\n", text) or re.search(r"Expected an? (.+?)(?:\. Got value|\n|$)", text)
    if types is None:
        lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("Parser key")]
        return " ".join(lines)[:_LONGEST]
    choices = [
        choice.strip("'\" ") for literal in re.findall(r"Literal\[([^\]]*)\]", text) for choice in literal.split(",")
    ]
    wrong = re.search(r"Got value: (.+)", text)
    hint = nearest(wrong[1] if wrong and choices else value, dict.fromkeys(choices)) if choices else ""
    return f"{shown} {readable_types(types[1])}{hint if 'mean' in hint else ''}"


def readable_types(text: str) -> str:
    """Types as jsonargparse prints them, without modules: 'int or list[str] or null'."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " or "), text)
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "[(") - (char in "])")
        parts = [*parts, ""] if char == "," and depth == 0 else [*parts[:-1], parts[-1] + char]
    return " or ".join(part.strip() for part in parts)


def _quoted(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml_io.inline(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _value_at(value: Any, key: str | None) -> Any:
    """The value at a dotted key."""
    for part in (key or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else value
    return value
