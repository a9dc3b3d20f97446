"""The arrows between files, read from their sources, and what importing a package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for name in ("workbench", "distill", "prune") for path in (ROOT / name).rglob("*.py"))
FORBIDDEN = {"workbench": {"distill", "prune"}, "distill": {"prune"}, "prune": {"distill"}}
TORCH_ONLY = {
    "prune": (
        *("masks", "keeping", "selection", "structure", "criteria", "allocation", "schedule", "pruner", "storage"),
        *("policies", "snapshot", "accounting"),
    ),
    "distill": ("losses", "features", "language", "int8"),
}
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


def pure(path: Path) -> bool:
    """Whether it is a file that imports torch only, or lies in such a folder."""
    package, name, *_ = path.relative_to(ROOT).with_suffix("").parts
    return name in TORCH_ONLY.get(package, ())


def test_pure_folders_are_looked_into() -> None:
    assert {path.stem for path in FILES if pure(path)} > {"masks", "logits", "features", "controls", "modules"}


@pytest.mark.parametrize("path", [path for path in FILES if pure(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pure_files_import_torch_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {"torch", "safetensors", "workbench", package, *sys.stdlib_module_names}
    assert tops(path) <= allowed
    shared = {name.rpartition(".")[0] for name in imports(path) if name.startswith("workbench.")}
    assert shared <= {
        f"workbench.{name}" for name in ("anatomy", "batches", "bits", "duration", "randomness", "ranks", "tokens")
    }
    inside = {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}
    assert inside <= set(TORCH_ONLY[package]), "and of their own package only one another"


def test_the_reader_of_checkpoints_is_torch_and_safetensors() -> None:
    """The reader and what it imports; activations only where one was swapped in."""
    for name in ("artifact", "architecture", "bits", "files", "resize"):
        path = ROOT / "workbench" / f"{name}.py"
        assert tops(path) <= {"torch", "safetensors", "workbench", *sys.stdlib_module_names}
        inside = {found.split(".")[1] for found in imports(path) if found.startswith("workbench.")}
        assert inside <= {"architecture", "bits", "files", "resize", "activations"}


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
        code = f"from workbench.cli import main\ntry: {call}\nexcept SystemExit as error: assert not error.code"
        assert loaded(code) == set()


def test_tests_mirror_the_packages() -> None:
    """Every test file of a package's folder is named after a file or folder of the package."""
    for package in ("workbench", "distill", "prune"):
        for test in (ROOT / "tests" / package).glob("test_*.py"):
            name = test.stem.removeprefix("test_")
            assert (ROOT / package / f"{name}.py").exists() or (ROOT / package / name).is_dir(), test
