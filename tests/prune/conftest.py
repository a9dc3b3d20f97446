"""Fixtures for tests that train with transformers."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """Every Trainer collects garbage, which takes longer than its training where so much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
