"""The arrows between files, read from their sources, and what importing a package costs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import architecture
from benchmarks.architecture import FLOORS

ROOT = Path(__file__).parent.parent
FILES = sorted(path for name in ("workbench", "distill", "prune") for path in (ROOT / name).rglob("*.py"))
FORBIDDEN = {"workbench": {"distill", "prune"}, "distill": {"prune"}, "prune": {"distill"}}

TORCH_ONLY = {
    "prune": (
        *("masks", "topk", "structures", "criteria", "allocation", "schedule", "pruner", "policies", "accounting"),
        "levels",
        *("rewinding.snapshot", "rewinding.modes", "rewinding.start"),
    ),
    "distill": ("losses", "features", "fused", "language"),
}
TORCH_ONLY_GROUND = (
    *("models.anatomy", "models.forward", "models.matrices", "models.positions", "models.wrappers"),
    *("checkpoints", "duration"),
    *("randomness", "distributed.ranks", "messages", "files", "lazy"),
)
HEAVY = ("torch", "lightning", "pytorch_lightning", "transformers", "datasets", "torchmetrics")


@functools.cache
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
        "models.wrappers",
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


# Where each source is tested

TESTED_IN: dict[str, str] = {
    "distill.losses.elementwise_modules": "distill/losses/test_elementwise.py",
    "distill.scored": "distill/test_callbacks.py",
    "distill.terms": "distill/test_objective.py",
    "workbench.checkpoints.int8": "distill/test_teacher.py",
    "workbench.data.hub": "workbench/data/test_images.py",
    "workbench.data.prepared": "workbench/data/test_images.py",
    "workbench.data.series.batches": "workbench/data/series/test_forecast.py",
    "workbench.data.splits": "workbench/data/test_digits.py",
    "workbench.export.inputs": "workbench/export/test_job.py",
    "workbench.export.onnx": "workbench/export/test_job.py",
    "workbench.export.torch": "workbench/export/test_job.py",
    "workbench.export.tracing": "workbench/export/test_job.py",
    "workbench.launcher.lineage": "workbench/launcher/test_runner.py",
    "workbench.launcher.runs": "workbench/launcher/sweep/test_job.py",
    "workbench.launcher.sweep.in_place": "workbench/launcher/sweep/test_job.py",
    "workbench.launcher.sweep.progress": "workbench/launcher/sweep/test_pool.py",
    "workbench.launcher.sweep.task": "workbench/launcher/sweep/test_job.py",
    "workbench.models.architecture": "workbench/models/test_resize.py",
    "workbench.models.arguments": "workbench/models/test_models.py",
    "workbench.models.norms": "workbench/models/test_models.py",
    "workbench.models.recurrent.heads": "workbench/models/test_recurrent.py",
    "workbench.models.recurrent.layer": "workbench/models/test_recurrent.py",
    "workbench.models.recurrent.stack": "workbench/models/test_recurrent.py",
    "workbench.models.transformer.layers": "workbench/models/test_transformer.py",
    "workbench.records.codec": "workbench/records/test_record.py",
    "workbench.records.comparison": "workbench/evaluation/test_section.py",
    "workbench.records.estimates": "workbench/report/test_bands.py",
    "workbench.records.export": "workbench/export/test_job.py",
    "workbench.records.hunt": "prune/tickets/sections/test_hunt.py",
    "workbench.records.network": "workbench/records/test_stages.py",
    "workbench.records.source": "workbench/launcher/test_arguments.py",
    "workbench.records.sweep": "workbench/launcher/sweep/test_section.py",
    "workbench.records.verdict": "prune/tickets/sections/test_verdict.py",
    "workbench.report.blocks": "workbench/report/test_page.py",
    "workbench.report.cells": "workbench/report/test_tables.py",
    "workbench.report.rows": "workbench/report/test_tables.py",
    "workbench.report.svg": "workbench/report/test_figures.py",
    "workbench.tasks.imitation": "distill/test_module.py",
    "workbench.training.callbacks": "workbench/training/test_loop.py",
    "workbench.training.fit": "workbench/training/test_loop.py",
    "workbench.training.resume": "workbench/training/test_loop.py",
    "workbench.training.save": "workbench/distributed/test_sharding.py",
    "distill.hf_labels": "distill/test_hf.py",
    "distill.hf_loader": "distill/test_hf.py",
    "distill.losses.reduction": "distill/losses/test_logits.py",
    "distill.student.units": "distill/student/test_cut_student.py",
    "prune.accounting.running": "prune/accounting/test_costs.py",
    "prune.callbacks.loop_rewind": "prune/callbacks/test_lottery.py",
    "prune.masks.load": "prune/policies/test_fixed.py",
    "prune.policies.calibration": "prune/policies/test_policy.py",
    "prune.policies.iterative": "prune/policies/test_policy.py",
    "prune.policies.optimizers": "prune/hf/test_base.py",
    "prune.policies.ownership": "prune/policies/test_policy.py",
    "prune.policies.timestamp": "prune/policies/test_dynamic.py",
    "prune.rewinding.lightning": "prune/callbacks/test_base.py",
    "prune.rewinding.start": "prune/tickets/test_arms.py",
    "prune.shrinking.architecture": "prune/shrinking/test_shrink.py",
    "prune.shrinking.explain": "prune/shrinking/test_shrink.py",
    "prune.shrinking.equivalence": "prune/shrinking/test_shrink.py",
    "prune.shrinking.find": "prune/shrinking/test_shrink.py",
    "prune.shrinking.producers": "prune/shrinking/test_shrink.py",
    "prune.shrinking.surgery": "prune/shrinking/test_shrink.py",
    "prune.shrinking.units": "prune/shrinking/test_shrink.py",
    "prune.shrinking.unused": "prune/shrinking/test_shrink.py",
    "prune.structures.fitting": "prune/structures/test_structures.py",
    "prune.structures.groups": "prune/structures/test_structures.py",
    "prune.structures.weights": "prune/structures/test_structures.py",
    "prune.tickets.diagnose": "prune/tickets/test_hunt.py",
    "prune.tickets.level": "prune/tickets/test_find.py",
    "prune.tickets.scores": "prune/tickets/test_hunt.py",
    "prune.tickets.search": "prune/tickets/test_lightning.py",
    "prune.tickets.subject": "prune/tickets/test_hunt.py",
    "prune.tickets.trainee": "prune/tickets/test_arms.py",
}
"""Sources without a test file or folder of their name: which file tests them, relative to tests/."""

MODULES = architecture.modules()


def defines(name: str) -> bool:
    """Whether the module defines functions or classes; else it only hands on names of others."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return any(isinstance(node, kinds) and node.name not in ("__getattr__", "__dir__") for node in tree.body)


def is_package(name: str) -> bool:
    return name in MODULES and MODULES[name].name == "__init__.py"


def namesakes(name: str) -> list[Path]:
    """Of a/b.py tests/a/test_b.py and the folder tests/a/b, as far as they are there."""
    place = ROOT.joinpath("tests", *name.split("."))
    file = place.with_name(f"test_{place.name}.py")
    return [path for path in (file, place) if path.is_file() or any(path.glob("**/test_*.py"))]


@functools.cache
def uses(path: Path) -> frozenset[str]:
    """Modules that the file imports, and those from which a package that it imports hands on the names."""
    modules: set[str] = set()
    todo = list(imports(path))
    while todo:
        full = todo.pop()
        folder, _, name = full.rpartition(".")
        modules |= {full, folder}
        if is_package(full) and MODULES[full] != path:
            modules |= {each.rpartition(".")[0] for each in imports(MODULES[full])}
        elif is_package(folder) and MODULES[folder] != path:
            todo += [each for each in imports(MODULES[folder]) if each.endswith(f".{name}") and each != full]
    return frozenset(modules & MODULES.keys())


@functools.cache
def reaches(name: str) -> frozenset[str]:
    """What the module and the modules of its folder that it uses, directly or not, import."""
    folder, todo, inside = name if is_package(name) else name.rpartition(".")[0], [name], set()
    while todo:
        module = todo.pop()
        inside.add(module)
        todo += [each for each in uses(MODULES[module]) - inside if each.rpartition(".")[0] == folder]
    return frozenset(inside.union(*(uses(MODULES[module]) for module in inside)))


SOURCES = [name for name, path in MODULES.items() if path.name != "__main__.py" and defines(name)]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_tested_in_one_place(name: str) -> None:
    """In a file or a folder of its name, or, where there is none, in the file that the table names."""
    own = namesakes(name)
    if not is_package(name):  # of a package the file tests its __init__, the folder its modules
        assert len(own) < 2, "one file or one folder"
    assert own or name in TESTED_IN, "write tests/.../test_<name>.py, or name the file in TESTED_IN that tests it"
    assert not (own and name in TESTED_IN), f"{own[0]} has its name: remove the row of TESTED_IN"


@pytest.mark.parametrize(("name", "test"), TESTED_IN.items())
def test_the_file_that_tests_a_source_imports_it(name: str, test: str) -> None:
    """The module, a package that hands its names on, or what imports it and hides it from users."""
    path = ROOT / "tests" / test
    assert name in SOURCES, "there is no such source: remove or rename the row"
    assert path.is_file(), "there is no such test file"
    assert any(name in reaches(module) for module in uses(path))
