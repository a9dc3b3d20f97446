"""A package that offers two jobs, to sweep over."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributions import write_metadata

PLUGIN = """
import os, signal, time
from pathlib import Path
from workbench import progress
from workbench.records.source import Source

calls = []

def make(size: int = 1, mood: str = "fine", seed_everything: int = 0, of: Source | None = None, out: Path = Path()):
    '''Make something.'''
    calls.append(out.name)
    progress.update(1, 2, "half")
    tried = (out / "tried").exists()
    (out / "tried").touch()
    if mood == "bad" or (mood == "once" and not tried):
        raise ArithmeticError("as asked")
    if mood == "lost" and not tried:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    (out / "made.txt").write_text(str(size))
    return {"metrics": {"test/loss": size + seed_everything / 10}, "monitor": ["loss", "min"], "seconds": 1.5}

def use(of: Source, others: list[Source] | None = None, out: Path = Path()):
    '''Use it.'''
    calls.append(out.name)
    return {"read": (Path(of) / "made.txt").read_text()}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module; `calls` says which folders its jobs worked in."""
    name = "plugin_for_sweeping"
    folder = tmp_path / "site"
    write_metadata(folder, name, f"[workbench.jobs]\nmake = {name}:make\nuse = {name}:use\n")
    (folder / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    yield __import__(name)
    del sys.modules[name]
