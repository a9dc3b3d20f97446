import numpy as np
import pytest

from tests.helpers.images import write


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for part, mark, suffix, n in [("train", "-", ".gz", 120), ("t10k", ".", "", 30)]:
        labels = np.arange(n, dtype=np.uint8) % 4
        images = (40 * labels[:, None, None] + random.randint(100, size=(n, 6, 5))).astype(np.uint8)
        write(tmp_path / f"{part}-images{mark}idx3-ubyte{suffix}", images)
        write(tmp_path / f"{part}-labels{mark}idx1-ubyte{suffix}", labels)
    return tmp_path
