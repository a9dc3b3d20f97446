import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.paths import expand_variables, resolve_path


def test_names_and_paths_stay(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/there")
    for name in ("owner/name", "name", "./a", "/a b/c", "packages:x"):
        assert resolve_path(name) == name
    assert resolve_path("$SOMEWHERE/x") == "/there/x"
    assert resolve_path(Path("~/x")) == os.path.expanduser("~/x")


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "a_package_with_a_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model" / "config.json").write_text("{}")
    (tmp_path / "a_package_in_one_file.py").touch()
    (tmp_path / "a_package_in_two_places").mkdir()
    other = tmp_path / "other" / "a_package_in_two_places" / "model"
    other.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_folder_in_a_package_is_found_without_importing_it(package):
    assert resolve_path("package:a_package_with_a_model/model") == str(package / "model")
    assert resolve_path("package:a_package_with_a_model") == str(package)
    assert resolve_path("package:a_package_with_a_model/model/config.json") == str(package / "model" / "config.json")
    assert "a_package_with_a_model" not in sys.modules
    two = resolve_path("package:a_package_in_two_places/model")
    assert two == str(package.parent / "other" / "a_package_in_two_places" / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package/model", "no package 'no_such_package' is installed here; install it"),
        ("package:a_package_in_one_file/model", "no package 'a_package_in_one_file' is installed"),
        ("package:", "no package '' is installed"),
        ("package:a.b/model", "no package 'a.b' is installed"),
        ("package:../x", "no package '..' is installed"),
        ("package:__main__/x", "no package '__main__' is installed"),
        ("package:a_package_with_a_model/nothing", "'a_package_with_a_model' has no 'nothing' in .*a_package_with"),
    ],
)
def test_what_is_not_there_is_named(package, name, message):
    with pytest.raises(ValueError, match=message):
        resolve_path(name)


def test_it_is_light():
    code = "import sys, workbench.paths; print(*{'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.setenv("SET", "/somewhere")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert expand_variables("$SET/a/${SET}") == "/somewhere/a//somewhere"
    for name in ("$NOT_SET/mnist", "${NOT_SET}/mnist"):
        with pytest.raises(ValueError, match="NOT_SET is not set: put NOT_SET=/folder/of/data before the command"):
            expand_variables(name)
    with pytest.raises(ValueError, match="EMPTY is not set"):
        resolve_path("$SET/$EMPTY/mnist")
