import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from workbench.randomness import isolated, same_random_state


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


@pytest.mark.parametrize("seed", [None, 2])
def test_isolated_items_continue_from_their_own_state(seed: int | None) -> None:
    """Whatever is drawn between them; and it goes on as if they had not been drawn."""

    def items() -> Iterator[list[float]]:
        while True:
            yield draw()

    seeded(2)
    expected = [draw(), draw()]
    after = []
    for count in (0, 2):
        seeded(2)
        found = []
        for item in isolated(items(), count, seed):
            found.append(item)
            after.append(draw())
        assert found == expected[:count]
        after.append(draw())
    assert after[0] == after[1] == expected[0]
    assert after[2] == expected[1]
    assert list(isolated([1], 3)) == [1]
