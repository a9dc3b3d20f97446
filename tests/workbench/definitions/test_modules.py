"""Where modules are, and which of them count."""

import sys
from pathlib import Path

import pytest

from tests.workbench.definitions.conftest import Edit
from workbench.definitions import module_source
from workbench.definitions.modules import is_installed, path_of, read_module, text_of


def test_a_module_is_found_without_its_parents_being_imported(project: Edit, tmp_path: Path) -> None:
    assert module_source("sub.deep") == str(tmp_path / "sub/deep.py")
    assert module_source("math") is None
    with pytest.raises(ValueError, match=r"there is no module 'sub\.none'"):
        module_source("sub.none")
    assert "sub" not in sys.modules
    assert path_of("sub") == tmp_path / "sub/__init__.py"


@pytest.mark.parametrize(
    "name", ["torch.nn", "json", "os.path", "workbench.models", "distill", "prune.masks", "builtins"]
)
def test_what_is_installed(name: str) -> None:
    assert is_installed(name)
    assert read_module(name) is None


def test_what_is_not(project: Edit, tmp_path: Path) -> None:
    assert not any(map(is_installed, ("net", "sub.deep", "__main__", "tests.helpers")))
    (tmp_path / "bare").mkdir()  # a namespace package
    (tmp_path / "bare/inner.py").write_text("X = 1\n")
    assert not is_installed("bare.inner")
    module = read_module("bare.inner")
    assert module is not None
    assert list(module.bound) == ["X"]


def test_beside_its_metadata_a_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("target_of_pip", "editable_of_pip"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "__init__.py").write_text("X = 1\n")
        monkeypatch.syspath_prepend(tmp_path / name)
    (tmp_path / "target_of_pip" / "target_of_pip-1.0.dist-info").mkdir()
    (tmp_path / "editable_of_pip" / "editable_of_pip.egg-info").mkdir()
    assert is_installed("target_of_pip")
    assert not is_installed("editable_of_pip")


def test_a_file_that_cannot_be_read_is_left_to_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_of_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_module("broken_of_syntax") is None


def test_what_is_bound_at_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top_of_module.py").write_text(
        "'''Doc.'''\nimport a.b, c as d\nfrom .e import f\nfrom g import *\nA: int = 1\nB = C = 2\n(E, F) = 1, 2\n"
        "A += 1\nfor G in range(3):\n    H = G\nwith open('x') as K:\n    pass\n"
        "try:\n    L = 1\nexcept OSError:\n    L = 2\n"
        "if A:\n    def M(): ...\nelse:\n    M = 1\nM.x['y'] = 3\nprint(A)\nif __name__ == '__main__':\n    N = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = read_module("top_of_module")
    assert module is not None
    assert {name: len(nodes) for name, nodes in module.bound.items()} == {
        "A": 2, "B": 1, "C": 1, "E": 1, "F": 1, "G": 1, "H": 1, "K": 1, "L": 2, "M": 3
    }  # fmt: skip
    assert module.imported == {"a": ("a", ""), "d": ("c", "")}, "there is no package around it"
    assert module.stars == ["g"]
    assert list(map(text_of, module.effects)) == ["range(3)", "open('x')", "A", "print(A)"]
