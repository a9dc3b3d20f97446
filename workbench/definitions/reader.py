"""Following definitions from module to module."""

import ast
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from workbench.definitions.bytecode import code_of, functions_of, names_in
from workbench.definitions.modules import MAIN, Module, digest, hashes, is_installed, path_of, read_module, text_of

Hashes = dict[str, dict[str, str]]
"""Module -> definition -> hash. A class has an entry for each of its methods, and one for the rest of it."""

TOP = "what it does when it is imported"
_EVERYTHING = ("globals", "eval", "exec", "__import__", "import_module")
"""Functions by which code reaches what its text does not name."""
_DEPTH, _LONGEST = 4, 100


def definitions(paths: Iterable[str]) -> Hashes:
    """The hashes of what dotted paths such as ``models.net.Net`` name, and of all that it uses.

    A path that names nothing, or something installed, adds nothing. Nothing is imported.
    """
    reader = _Reader()
    for path in paths:
        parts = path.split(".")
        if len(parts) > 1 and all(part.isidentifier() for part in parts):
            reader.read_path(parts)
    return reader.result()


def definitions_of(values: Iterable[Any]) -> Hashes:
    """The same of objects: their classes, those of a module's submodules, and functions that they hold.

    What was defined where there is no file, as in a notebook, is known by its byte code.
    """
    reader = _Reader()
    for value in _named(values):
        reader.read_object(value)
    return reader.result()


def difference(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> str:
    """What has changed, for a message: ``models/net.py has changed: Net.forward``; empty if nothing has."""
    texts = []
    for module in dict.fromkeys([*now, *before]):
        old, new = before.get(module), now.get(module)
        if old is None or new is None:
            texts.append(f"{_file(module)} is {'used only now' if old is None else 'used no longer'}")
            continue
        names = [name for name in old if name in new and old[name] != new[name]]
        names += [f"{name} is used only now" for name in new if name not in old]
        names += [f"{name} is used no longer" for name in old if name not in new]
        if names:
            texts.append(f"{_file(module)} has changed: {', '.join(names)}")
    return "; ".join(texts)


@final
class _Reader:
    """What it has found so far."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}
        self._found: dict[str, dict[str, str]] = {}
        self._seen: set[tuple[str, str]] = set()

    def result(self) -> Hashes:
        """Sorted."""
        return {module: dict(sorted(found.items())) for module, found in sorted(self._found.items()) if found}

    def read_path(self, parts: list[str]) -> None:
        """What a dotted path names; all of its module if that cannot be told."""
        for end in range(len(parts) - 1, 0, -1):
            module = self._module(".".join(parts[:end]))
            if module is None or self._read(module, parts[end]):
                if module is None:
                    continue
                return
            # A package may hand on names when they are asked for.
            value = getattr(sys.modules.get(module.name), parts[end], None)
            if isinstance(value, type | types.FunctionType):
                self.read_object(value)
            return

    def read_object(self, value: Any) -> None:
        """A class or function."""
        name = value.__module__ or ""
        if is_installed(name):
            return
        module = self._module(name)
        if module is None or not self._read(module, value.__qualname__.partition(".")[0]):
            self._read_code(value)

    def _read(self, module: Module, name: str) -> bool:
        """What binds a name at the top of a module; returns whether anything does."""
        nodes = module.bound.get(name, [])
        if not nodes and name not in module.imported:
            others = [other for star in module.stars if (other := self._module(star)) is not None]
            return any(self._read(other, name) for other in others)
        if (module.name, name) in self._seen:
            return True
        self._seen.add((module.name, name))
        self._enter(module)
        if name in module.imported:
            self._read_import(*module.imported[name])
        if nodes:
            self._found.setdefault(module.name, {}).update(hashes(name, nodes))
        for node in nodes:
            self._follow(module, node)
        return True

    def _read_code(self, value: Any) -> None:
        """A class or function of which there is no source, and what it uses of the same kind."""
        module, name = value.__module__ or "", value.__qualname__
        if (module, f"{name} in memory") in self._seen:
            return
        self._seen.add((module, f"{name} in memory"))
        functions = functions_of(value)
        if functions:
            code = [f"{function.__name__} {code_of(function.__code__)}" for function in functions]
            self._found.setdefault(module, {})[name] = digest("\n".join(code))
        used: list[Any] = list(value.__mro__[1:]) if isinstance(value, type) else []
        for function in functions:
            used += [function.__globals__.get(each) for each in sorted(names_in(function.__code__))]
        for each in used:
            if isinstance(each, type | types.FunctionType):
                self.read_object(each)

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = read_module(name)
        return self._modules[name]

    def _enter(self, module: Module) -> None:
        """What a module does when it is imported, and what those do that it imports; not of a script that is run."""
        if (module.name, "") in self._seen:
            return
        self._seen.add((module.name, ""))
        for name in module.modules:
            if (other := self._module(name)) is not None:
                self._enter(other)
        if module.name != MAIN and module.effects:
            self._found.setdefault(module.name, {})[TOP] = digest("\n".join(map(text_of, module.effects)))
            for node in module.effects:
                self._follow(module, node)

    def _read_import(self, name: str, attribute: str) -> None:
        """What an import brings: a definition of a module, or a module with all that is in it."""
        module = self._module(name)
        if not (attribute and module is not None and self._read(module, attribute)):
            self._read_all(f"{name}.{attribute}" if attribute else name)

    def _read_all(self, name: str) -> None:
        module = self._module(name)
        for each in () if module is None else (*module.bound, *module.imported):
            assert module is not None, "it has names"
            self._read(module, each)

    def _follow(self, module: Module, node: ast.AST) -> None:
        """Everything that code of a module names."""
        inside: set[int] = set()  # parts of a dotted name that was followed as a whole
        for part in ast.walk(node):
            if isinstance(part, ast.Import | ast.ImportFrom):
                for _, name, attribute in module.imports(part):
                    self._read_import(name, "" if attribute == "*" else attribute)
            elif isinstance(part, ast.Attribute) and id(part) not in inside:
                if part.attr == "import_module":
                    self._read_all(module.name)
                names, nodes = _dotted(part)
                if names and names[0] in module.imported and names[0] not in module.bound:
                    inside.update(map(id, nodes))
                    self._through(module, names)
            elif isinstance(part, ast.Name) and id(part) not in inside:
                if part.id in _EVERYTHING:
                    self._read_all(module.name)
                self._read(module, part.id)

    def _through(self, module: Module, names: list[str]) -> None:
        """What a dotted name leads to, as ``helpers.layers.Block``, of which the first part was imported."""
        where, attribute = module.imported[names[0]]
        first = self._module(where)
        if attribute and first is not None and self._read(first, attribute):
            return
        where = f"{where}.{attribute}" if attribute else where
        for each in names[1:]:
            inner = self._module(where)
            if inner is not None and self._read(inner, each):
                return
            if self._module(f"{where}.{each}") is None:
                break
            where = f"{where}.{each}"
        self._read_all(where)


def _named(values: Iterable[Any], depth: int = 0, seen: set[int] | None = None) -> Iterator[Any]:
    """The classes and functions of objects."""
    seen = set() if seen is None else seen
    for value in values:
        if id(value) in seen or value is None or isinstance(value, (bool, int, float, str, bytes)):
            continue
        seen.add(id(value))
        if isinstance(value, type | types.FunctionType):
            yield value
        elif isinstance(value, types.MethodType):
            yield from _named([value.__func__, value.__self__], depth + 1, seen)
        elif isinstance(value, functools.partial):
            yield from _named([value.func, *value.args, *value.keywords.values()], depth + 1, seen)
        elif depth > _DEPTH:
            yield type(value)
        elif isinstance(value, Mapping):
            yield from _named(list(value.values())[:_LONGEST], depth + 1, seen)
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield from _named(list(value)[:_LONGEST], depth + 1, seen)
        elif hasattr(value, "named_modules"):  # torch is not imported here
            for part in value.modules():
                yield type(part)
                yield from _named(vars(part).values(), _DEPTH, seen)
        else:
            yield type(value)
            yield from _named(getattr(value, "__dict__", {}).values(), depth + 1, seen)


def _dotted(node: ast.Attribute) -> tuple[list[str], list[ast.AST]]:
    """``a.b.c`` as its names and its parts; without names if it does not begin with one."""
    names, nodes = [], []
    part: ast.expr = node
    while isinstance(part, ast.Attribute):
        names.append(part.attr)
        nodes.append(part)
        part = part.value
    return ([part.id, *reversed(names)] if isinstance(part, ast.Name) else []), [*nodes, part]


def _file(module: str) -> str:
    """The file of a module as a person looks for it."""
    if module == MAIN:
        return Path(getattr(sys.modules[MAIN], "__file__", None) or "the notebook").name
    path, name = path_of(module), module.replace(".", "/")
    return f"{name}/__init__.py" if path is not None and path.name == "__init__.py" else f"{name}.py"
