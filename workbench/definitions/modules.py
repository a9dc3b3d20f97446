"""Modules as they are on disk: where, whether installed, and what each name at the top is bound by."""

import ast
import copy
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import final

MAIN = "__main__"
_OWN = ("workbench", "prune", "distill")
_INSTALLED = {"site-packages", "dist-packages"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@final
class Module:
    """The top of a module.

    Args:
        name: Its dotted name.
        tree: Its syntax tree.
        is_package: Whether relative imports start at itself.

    Attributes:
        bound: Name -> the definitions, assignments and loops that bind it, or an attribute or an item of it.
        imported: Name -> the module it comes from, and its name there, empty for the module itself.
        stars: Modules of which everything is imported.
        modules: Everything imported that may be a module, and the packages around this one.
        effects: What else is done when it is imported, other than under ``if __name__ == ...``.
    """

    def __init__(self, name: str, tree: ast.Module, is_package: bool) -> None:
        self.name = name
        self._package = name if is_package else name.rpartition(".")[0]
        parts = name.split(".")
        self.bound: dict[str, list[ast.AST]] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        self.stars: list[str] = []
        self.modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        self.effects: list[ast.AST] = []
        for node in tree.body:
            self._read(node)

    def imports(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str, str]]:
        """Name, module, and the name there, of each part of an import statement."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name, "") if alias.asname else (first, first, "")
            return
        module = node.module or ""
        if node.level:
            try:
                module = resolve_name("." * node.level + module, self._package or None)
            except ImportError:
                return
        for alias in node.names:
            yield alias.asname or alias.name, module, alias.name

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, _Definition):
            self._bind([node.name], node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self.modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name, module, attribute in self.imports(node):
                self.modules += [module, *([f"{module}.{attribute}"] if attribute not in ("", "*") else [])]
                if name == "*":
                    self.stars.append(module)
                else:
                    self.imported[name] = module, attribute
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self._bind([name for target in targets for name in _names(target)], node)
        elif isinstance(node, ast.If | ast.While):
            if "__name__" not in ast.unparse(node.test):
                self.effects.append(node.test)
                self._read_all(node.body, node.orelse)
        elif isinstance(node, ast.For):
            self.effects.append(node.iter)
            self._bind(_names(node.target), node.iter)
            self._read_all(node.body, node.orelse)
        elif isinstance(node, ast.With):
            for item in node.items:
                self.effects.append(item.context_expr)
                self._bind(_names(item.optional_vars), item.context_expr)
            self._read_all(node.body)
        elif isinstance(node, ast.Try):
            self._read_all(node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody)
        elif not isinstance(node, ast.Pass) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            self.effects.append(node)

    def _read_all(self, *bodies: Iterable[ast.stmt]) -> None:
        for body in bodies:
            for node in body:
                self._read(node)

    def _bind(self, names: Iterable[str], node: ast.AST) -> None:
        for name in names:
            self.bound.setdefault(name, []).append(node)


def read_module(name: str) -> Module | None:
    """A module whose source counts; None if it is installed, or has none."""
    path = None if is_installed(name) else path_of(name)
    if path is None:
        return None
    try:
        return _parsed(name, path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError):
        return None  # importing it says so


@functools.lru_cache(256)
def _parsed(name: str, path: Path, changed: int) -> Module:
    return Module(name, ast.parse(path.read_bytes(), str(path)), path.name == "__init__.py")


def module_source(name: str) -> str | None:
    """The path of a module's source; None if it has none.

    Raises:
        ValueError: If there is no such module.
    """
    if (spec := _spec(name)) is None:
        raise ValueError(f"there is no module '{name}'")
    return spec.origin if spec.origin is not None and spec.origin.endswith(".py") else None


def path_of(name: str) -> Path | None:
    """The source of a module that is imported, or could be; None if it has none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None and name != MAIN:
        spec = _spec(name)
        file = None if spec is None else spec.origin
    return Path(file) if file is not None and file.endswith(".py") and Path(file).is_file() else None


def is_installed(name: str) -> bool:
    """Whether a module is of the standard library, of this project, or of a distribution that is not editable."""
    top = name.partition(".")[0]
    if top in _OWN or (top in sys.stdlib_module_names and top != MAIN):
        return True
    return top != MAIN and _is_installed(top, getattr(sys.modules.get(top), "__file__", None))


@functools.lru_cache(1024)
def _is_installed(top: str, file: str | None) -> bool:
    spec = _spec(top) if file is None else None
    places = [file, *([spec.origin, *(spec.submodule_search_locations or ())] if spec else [])]
    folders = [Path(place).resolve().parent for place in places if place is not None]
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    for folder in folders:
        if _INSTALLED & set(folder.parts) or any(folder.is_relative_to(each) for each in standard):
            return True
        # The folder that is on the path; an editable distribution has its metadata elsewhere.
        site = folder.parent if folder.name == top else folder
        if next(site.glob("*.dist-info"), None) is not None:
            return True
    return False


def hashes(name: str, nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Definition -> hash of what binds a name: of a class its methods one by one, and what is left of it."""
    parts: dict[str, list[str]] = {}
    for node in nodes:
        rest = node
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            for method in methods:
                parts.setdefault(f"{name}.{method.name}", []).append(text_of(method))
            rest = copy.copy(node)
            rest.body = [each for each in node.body if each not in methods] or [ast.Pass()]
        parts.setdefault(name, []).append(text_of(rest))
    return {key: digest("\n".join(texts)) for key, texts in parts.items()}


def text_of(node: ast.AST) -> str:
    """Code as text, without comments, blank lines and docstrings."""
    return ast.unparse(_Undocumented().visit(ast.parse(ast.unparse(node))))


def digest(text: str) -> str:
    """Short enough to be read in a record."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@final
class _Undocumented(ast.NodeTransformer):
    """Removes texts that stand alone."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Nothing in place of a text."""
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """``pass`` where nothing is left."""
        super().generic_visit(node)
        if isinstance(node, _Definition) and not node.body:
            node.body = [ast.Pass()]
        return node


def _names(target: ast.AST | None) -> list[str]:
    return [] if target is None else [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def _spec(module: str) -> ModuleSpec | None:
    """Where ``module`` is. Unlike ``find_spec`` it imports no parent package, which may be slow to import."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
        for depth in range(1, len(rest) + 1):
            if spec is None:
                return None
            name = ".".join([top, *rest[:depth]])
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or ()))
        return spec
    except (ImportError, ValueError):
        return None
