"""The table of users' set-ups: each is built as its owner would build it, and gives the right value."""

import importlib
import pkgutil

import pytest

import tests.setups
from tests.setups.base import NAMED, Setup

MODULES = [module.name for module in pkgutil.iter_modules(tests.setups.__path__) if module.name != "base"]
SETUPS: list[Setup] = [setup for name in MODULES for setup in importlib.import_module(f"tests.setups.{name}").SETUPS]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup.topic}-{setup.name}")
def test_holds(setup: Setup) -> None:
    setup.check()


@pytest.mark.parametrize(("topic", "name"), [(topic, name) for topic, names in NAMED.items() for name in names])
def test_every_set_up_has_its_row(topic: str, name: str) -> None:
    assert any((setup.topic, setup.name) == (topic, name) for setup in SETUPS)


def test_no_row_is_unnamed() -> None:
    rows = [(setup.topic, setup.name) for setup in SETUPS]
    assert len(set(rows)) == len(rows)
    assert all(name in NAMED.get(topic, ()) for topic, name in rows)
