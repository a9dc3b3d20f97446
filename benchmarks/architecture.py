"""The arrows between files and folders, read from the sources: ``python -m benchmarks.architecture``.

An arrow is an import, wherever in a file it stands, also inside a function. At every folder its children (files and
subfolders) are rooms; a room's floor is one above the highest room that it imports.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("workbench", "distill", "prune")
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Arrow:
    """One import: the module that imports, the module imported, and where."""

    source: str
    target: str
    file: Path
    line: int


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The packages' files by dotted name; a package's ``__init__`` has the package's name."""
    files = (path for name in PACKAGES for path in sorted((root / name).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def arrows(root: Path = ROOT) -> Iterator[Arrow]:
    """Every import of a module of the packages by another one."""
    known = modules(root)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                targets = {each if each in known else node.module for each in full}
            elif isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names}
            else:
                continue
            for target in sorted(targets & known.keys() - {name}):
                yield Arrow(name, target, path, node.lineno)


def rooms(folder: str, every: list[Arrow]) -> Graph:
    """The children of ``folder`` ("" for the packages) that arrows tie together, and whom each imports.

    A package's ``__init__`` hands names on and is no room of its own.
    """
    start = f"{folder}." if folder else ""
    graph: Graph = {}
    for arrow in every:
        if arrow.source.startswith(start) and arrow.target.startswith(start):
            source, target = (name[len(start) :].split(".")[0] for name in (arrow.source, arrow.target))
            graph.setdefault(source, set())
            graph.setdefault(target, set())
            if source != target:
                graph[source].add(target)
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Rooms that import each other in a circle, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph.get(name, set()) - done):
            if circle := visit(other, (*path, name)):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, ()))), [])


def floors(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the ground first, of a graph without a cycle."""
    height: dict[str, int] = {}

    def at(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((at(other) for other in graph[name]), default=-1)
        return height[name]

    for name in graph:
        at(name)
    return [
        sorted(name for name in graph if height[name] == floor) for floor in range(max(height.values(), default=-1) + 1)
    ]


def folders(root: Path = ROOT) -> list[str]:
    """Every folder of the packages by dotted name, and "" for the packages themselves."""
    return ["", *sorted({".".join(path.relative_to(root).parent.parts) for path in modules(root).values()})]


def main() -> None:
    """Print rooms, arrows and floors of each package."""
    every = list(arrows())
    for package in PACKAGES:
        graph = rooms(package, every)
        print(f"{package}: {len(graph)} rooms, {sum(map(len, graph.values()))} arrows")
        for number, floor in reversed(list(enumerate(floors(graph)))):
            print(f"  {number}  {' '.join(floor)}")


if __name__ == "__main__":
    main()
