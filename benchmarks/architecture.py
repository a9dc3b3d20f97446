"""The arrows between files and folders, read from the sources: ``python -m benchmarks.architecture [PICTURE.svg]``.

An arrow is an import, wherever in a file it stands, also inside a function. At every folder its children (files and
subfolders) are rooms; a room's floor is one above the highest room that it imports.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("workbench", "distill", "prune")
Graph = dict[str, set[str]]

FLOORS = {
    "workbench": (
        "launcher",
        "evaluation diagnostics export",
        "training data",
        "report tasks checkpoints",
        "models records",
        "distributed randomness duration paths files yaml_io messages progress lazy definitions",
    ),
    "prune": (
        "tickets",
        "callbacks hf shrinking",
        "policies accounting",
        "pruner",
        "allocation structures",
        "rewinding criteria connectivity topk",
        "masks schedule levels",
    ),
    "distill": (
        "module callbacks hf",
        "targets scored hf_columns hf_vocabulary hf_loader",
        "cache student",
        "teacher objective language",
        "losses features hf_labels terms",
        "fused",
    ),
}
"""From the top floor down: a room imports only what stands below it, or beside it without a circle."""


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


ROW, BOX, GAP, WIDTH = 74, 34, 12, 1120
_STYLE = """
text { font: 13px sans-serif; fill: #1a1a2e } .name { font-weight: 600; font-size: 15px }
rect { fill: #e8eaf6; stroke: #5c6bc0; rx: 5 } path { fill: none; stroke: #9fa8da; stroke-width: 1; opacity: .6 }
"""


def svg(root: Path = ROOT) -> str:
    """The rooms of each package on their floors as an SVG picture: a room imports only what stands below it."""
    every, lines = list(arrows(root)), line_counts(root)
    parts: list[str] = []
    top = 0
    for package in reversed(PACKAGES):
        graph = rooms(package, every)
        graph.pop("__main__", None)
        levels = list(reversed(floors(graph)))
        place = _places(package, levels, lines, top + 30)
        parts.append(f'<text class="name" x="8" y="{top + 20}">{package}/</text>')
        for room, others in graph.items():
            parts += [_curve(place[room], place[other]) for other in sorted(others)]
        for room, (x, y, width) in place.items():
            size = lines[f"{package}.{room}"]
            parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}"/>')
            label = f'{room} <tspan opacity=".55">{size}</tspan>'
            parts.append(f'<text x="{x + width / 2}" y="{y + 21}" text-anchor="middle">{label}</text>')
        top += 30 + ROW * len(levels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" style="background:#fff">'
    return "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def line_counts(root: Path = ROOT) -> dict[str, int]:
    """Lines of every room of a package, by its dotted name: of a file, or of all files of a folder."""
    counts: dict[str, int] = {}
    for name, path in modules(root).items():
        room = ".".join(name.split(".")[:2])
        counts[room] = counts.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return counts


def _places(
    package: str, levels: list[list[str]], lines: Mapping[str, int], top: int
) -> dict[str, tuple[float, float, float]]:
    """Left edge, top edge and width of each room's box; wider boxes hold more lines."""
    place: dict[str, tuple[float, float, float]] = {}
    for row, names in enumerate(levels):
        widths = [max(9.5 * len(name) + 50, 3 * lines[f"{package}.{name}"] ** 0.5) for name in names]
        x = (WIDTH - sum(widths) - GAP * (len(names) - 1)) / 2
        for name, width in zip(names, widths, strict=True):
            place[name] = (round(x, 1), top + ROW * row, round(width, 1))
            x += width + GAP
    return place


def _curve(source: tuple[float, float, float], target: tuple[float, float, float]) -> str:
    """From the bottom of one box to the top of another."""
    x, y = source[0] + source[2] / 2, source[1] + BOX
    u, v = target[0] + target[2] / 2, target[1]
    middle = (y + v) / 2
    return f'<path d="M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {u:.1f} {middle:.1f} {u:.1f} {v:.1f}"/>'


def main() -> None:
    """Print rooms, arrows and floors of each package; with a path, write the picture there."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(svg(), encoding="utf-8")
    every = list(arrows())
    for package in PACKAGES:
        graph = rooms(package, every)
        print(f"{package}: {len(graph)} rooms, {sum(map(len, graph.values()))} arrows")
        for number, floor in reversed(list(enumerate(floors(graph)))):
            print(f"  {number}  {' '.join(floor)}")


if __name__ == "__main__":
    main()
