"""Functions of which there is no source: their byte code, without line numbers."""

import inspect
import types
from typing import Any


def functions_of(value: Any) -> list[types.FunctionType]:
    """A function, or those of a class."""
    parts = list(vars(value).values()) if isinstance(value, type) else [value]
    parts += [getattr(part, name) for part in parts if isinstance(part, property) for name in ("fget", "fset")]
    plain = [inspect.unwrap(getattr(part, "__func__", part)) for part in parts if part is not None]
    return [each for each in plain if isinstance(each, types.FunctionType)]


def code_of(code: types.CodeType) -> str:
    """Instructions, names and constants, as text."""
    return f"{code.co_code.hex()} {code.co_names} [{', '.join(map(_constant, code.co_consts))}]"


def names_in(code: types.CodeType) -> set[str]:
    """Names that the code asks for, also inside."""
    inner = [names_in(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return code_of(value)
    # The order of a set's members differs from process to process.
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
