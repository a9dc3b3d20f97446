"""Every test here trains with transformers."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_collection(quick_collection: None) -> None:
    pass
