"""A cache on disk."""

from pathlib import Path

import pytest

from distill.cache import cache_teacher
from tests.helpers.cache_data import Speaking, Words, loader, pad


@pytest.fixture
def cached_words(tmp_path: Path) -> Path:
    """A cache of words, of several lengths, with logits and features."""
    cache_teacher(Speaking(), loader(Words(), 3, collate_fn=pad), tmp_path / "made", features=["embed"], shard_size=3)
    return tmp_path / "made"
