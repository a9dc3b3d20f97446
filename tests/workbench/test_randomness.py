import random

import numpy as np
import pytest
import torch

from workbench.randomness import same_random_state


def draw() -> list[float]:
    return [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def test_the_random_state_is_kept_also_after_an_exception() -> None:
    seeded(1)
    expected = draw()
    seeded(1)

    def fail() -> None:
        assert draw() == expected
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), same_random_state():
        fail()
    assert draw() == expected


def test_draws_inside_may_start_from_a_seed() -> None:
    seeded(2)
    wanted = draw()
    seeded(1)
    expected = draw()
    seeded(1)
    with same_random_state(2):
        assert draw() == wanted != expected
    assert draw() == expected
