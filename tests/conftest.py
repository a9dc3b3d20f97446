"""What every test has: no network, one thread, random state left as it was found."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # by which Lightning would seed the processes of a later test
        os.environ.pop(name, None)
    yield
    assert not torch.distributed.is_initialized(), "a test left its process group behind"
