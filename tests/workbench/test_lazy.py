"""Packages whose names are imported on first use."""

import subprocess
import sys
from importlib import import_module

import pytest

from workbench import lazy

PACKAGES = [
    "workbench",
    *(f"workbench.{name}" for name in ("checkpoints", "data", "diagnostics", "distributed", "models", "training")),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_of_a_package_exists(name: str) -> None:
    package = import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for each in package.__all__:
        assert getattr(package, each) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_importing_the_packages_imports_no_torch() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_submodule_is_imported_too() -> None:
    find, listed = lazy.attach("workbench", {"files": "workbench.files", "sha256": "workbench.files"})
    assert find("files") is import_module("workbench.files")
    assert find("sha256") is import_module("workbench.files").sha256
    assert listed() == ["files", "sha256"]
