"""A project of several modules on the path."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NET = '''
"""Networks."""
import helpers
from shared import act, make
from sub.deep import Deep as Base
from sub import sizes

WIDTH = 4
UNUSED = 1

class Net(Base):
    """A net."""

    width = WIDTH

    def __init__(self):
        self.layer = make(sizes.OUT)

    def forward(self, x):
        # a comment
        return act(helpers.scale(x))

def other(x):
    return x
'''
HELPERS = """
def scale(x):
    return 2 * inner(x)

def inner(x):
    return x + 1

def left(x):
    return x
"""
FILES = {
    "net.py": NET,
    "helpers.py": HELPERS,
    "shared.py": "from inside import *\nimport patches\n",
    "inside.py": "def act(x):\n    return x\n\ndef make(n):\n    return n\n",
    "patches.py": "import helpers\nregistered = []\nregistered.append(helpers.left)\n",
    "sub/__init__.py": "from .deep import Deep\n",
    "sub/deep.py": "from . import sizes\n\nclass Deep:\n    size = sizes.IN\n",
    "sub/sizes.py": "IN = 3\nOUT = 4\nREST = 5\n",
}

Edit = Callable[[str, str, str], None]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """The project; called with a file, a text in it and what to put there."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def edit(name: str, old: str, new: str) -> None:
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))

    yield edit
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
