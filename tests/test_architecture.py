"""The arrows between files, read from their sources, and what importing a package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import architecture

ROOT = Path(__file__).parent.parent
FILES = sorted(path for name in ("workbench", "distill", "prune") for path in (ROOT / name).rglob("*.py"))
FORBIDDEN = {"workbench": {"distill", "prune"}, "distill": {"prune"}, "prune": {"distill"}}

FLOORS = {
    "workbench": (
        "launcher",
        "evaluation diagnostics export",
        "training data",
        "report tasks checkpoints",
        "models records",
        "distributed randomness duration paths files yaml_io messages progress lazy",
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
        "targets",
        "cache student",
        "teacher objective language",
        "losses features hf_labels",
    ),
}
"""From the top floor down: a room imports only what stands below it, or beside it without a circle."""

TORCH_ONLY = {
    "prune": (
        *("masks", "topk", "structures", "criteria", "allocation", "schedule", "pruner", "policies", "accounting"),
        "levels",
        *("rewinding.snapshot", "rewinding.modes", "rewinding.start"),
    ),
    "distill": ("losses", "features", "language"),
}
TORCH_ONLY_GROUND = (
    *("models.anatomy", "models.forward", "models.positions", "checkpoints", "duration"),
    *("randomness", "distributed.ranks", "messages", "files", "lazy"),
)
HEAVY = ("torch", "lightning", "pytorch_lightning", "transformers", "datasets", "torchmetrics")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_all_three_packages_are_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"workbench", "distill", "prune"}
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_points_back(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not tops(path) & FORBIDDEN[package]
    assert "tests" not in tops(path)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def pure(path: Path) -> bool:
    """Whether it is a file that imports torch only, or lies in such a folder."""
    package, _, inside = dotted(path).partition(".")
    return any(f"{inside}.".startswith(f"{name}.") for name in TORCH_ONLY.get(package, ()))


def test_pure_folders_are_looked_into() -> None:
    assert {path.stem for path in FILES if pure(path)} > {
        "masks",
        "snapshot",
        "logits",
        "features",
        "controls",
        "modules",
    }


@pytest.mark.parametrize("path", [path for path in FILES if pure(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pure_files_import_torch_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {"torch", "safetensors", "workbench", package, *sys.stdlib_module_names}
    assert tops(path) <= allowed
    for name in imports(path):
        top, _, inside = name.partition(".")
        if top == "workbench":
            assert any(f"{inside}.".startswith(f"{each}.") for each in TORCH_ONLY_GROUND), name
        elif top == package:
            pure_names = (*TORCH_ONLY[package], "Masks")
            assert any(f"{inside}.".startswith(f"{each}.") for each in pure_names), (
                f"{name}: of their own package only one another"
            )


def test_the_reader_of_checkpoints_is_torch_and_safetensors() -> None:
    """The reader and what it imports; activations only where one was swapped in."""
    reader = (
        "checkpoints.compact",
        "checkpoints.bits",
        "models.architecture",
        "models.resize",
        "files",
        "models.activations",
    )
    for name in reader[:-1]:
        path = ROOT / "workbench" / f"{name.replace('.', '/')}.py"
        assert tops(path) <= {"torch", "safetensors", "workbench", *sys.stdlib_module_names}
        for found in imports(path):
            top, _, inside = found.partition(".")
            assert top != "workbench" or any(
                f"workbench.{found}".endswith(each) or inside.startswith(each) for each in reader
            ), found


ARROWS = list(architecture.arrows())


def test_no_folder_has_a_cycle() -> None:
    """At any level, whatever is imported where: lazily, for types, or at the top."""
    assert len(ARROWS) > 500
    for folder in architecture.folders():
        assert architecture.cycle(architecture.rooms(folder, ARROWS)) == [], folder


def test_a_cycle_is_found() -> None:
    assert architecture.cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert architecture.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [["c"], ["b"], ["a"]]


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_goes_to_a_higher_floor(package: str) -> None:
    floor = {room: -number for number, names in enumerate(FLOORS[package]) for room in names.split()}
    graph = architecture.rooms(package, ARROWS)
    graph.pop("__main__", None)
    assert floor.keys() >= graph.keys(), "every room has a floor"
    on_disk = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert floor.keys() == on_disk - {"__init__", "__main__"}
    assert [(room, other) for room in graph for other in graph[room] if floor[other] > floor[room]] == []


def test_there_is_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = set()
        for node in tree.body:  # at import time; a lazy import inside a function is no arrow of the module
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    graph[name].add(full if full in names else node.module)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in graph and name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def loaded(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after the statement."""
    code = f"{statement}\nimport sys\nprint('loaded', *[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("package", ["prune", "distill", "workbench"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert loaded(f"import {package}") == set()


def test_masks_and_losses_need_torch_only() -> None:
    code = "from prune import Masks, Pruner; from prune.connectivity import barrier; from distill import losses"
    assert loaded(f"{code}; losses.soft_target") == {"torch"}


def test_loading_a_checkpoint_needs_torch_only() -> None:
    assert loaded("from workbench import load, save") == {"torch"}


def test_every_lazy_name_exists() -> None:
    import distill
    import prune
    import workbench

    for package in (distill, prune, workbench):
        assert set(dir(package)) == set(package.__all__), "what is looked for by name is found"
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = package.nonsense  # type: ignore[attr-defined]


def test_help_and_listing_load_nothing_heavy() -> None:
    for arguments in (["run"], ["run", "--help"], ["run", "digits", "--help"]):
        call = f"main('lightning', {arguments!r})"
        code = (
            f"from workbench.launcher.cli import main\ntry: {call}\nexcept SystemExit as error: assert not error.code"
        )
        assert loaded(code) == set()


def test_tests_mirror_the_packages() -> None:
    """Every test file of a package's folder is named after a file or folder of the package."""
    for package in ("workbench", "distill", "prune"):
        for test in (ROOT / "tests" / package).glob("test_*.py"):
            name = test.stem.removeprefix("test_")
            assert (ROOT / package / f"{name}.py").exists() or (ROOT / package / name).is_dir(), test
