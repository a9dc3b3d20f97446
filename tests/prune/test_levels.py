from typing import Any

import pytest

from prune.levels import SPARSEST, Levels


@pytest.mark.parametrize(
    ("arguments", "densities"),
    [
        ({"count": 2, "rate": 0.5}, (1, 0.5, 0.25)),
        ({"count": 0}, (1,)),
        ({"count": 2, "rate": 0.0}, (1, 1, 1)),
        ({"density": 0.1, "rate": 0.5}, (1, 0.5, 0.25, 0.125, 0.0625)),
        ({"density": [0.5, 0.2]}, (1, 0.5, 0.2)),
        ({"density": [1.0, 0.5]}, (1, 0.5)),
    ],
)
def test_densities(arguments: Any, densities: tuple[float, ...]) -> None:
    assert Levels(**arguments).densities() == densities


def test_a_bound_on_the_drop_alone_goes_to_the_sparsest() -> None:
    *before, last = Levels(max_drop=0.02).densities()
    assert last <= SPARSEST < before[-1]


def test_short_spellings() -> None:
    assert Levels.parse(8) == Levels(8)
    assert Levels.parse(None, 0.1) == Levels(density=0.1)
    assert Levels.parse(Levels(rate=0.3, patience=2), [0.5, 0.2]) == Levels(density=[0.5, 0.2], rate=0.3, patience=2)
    for both in (8, Levels(8)):
        with pytest.raises(ValueError, match="only one of them"):
            Levels.parse(both, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1.5}, "levels is 1.5: give how many times to prune, an integer"),
        ({"count": True}, "levels is True"),
        ({"count": -1}, "levels is -1"),
        ({"count": 1, "rate": 1.0}, "rate is 1.0"),
        ({"rate": -0.1}, "rate is -0.1"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density": [0.2, 0.5]}, "give densities below 1 in falling order"),
        ({"density": [1.0]}, "give densities below 1 in falling order"),
        ({"count": 1, "max_drop": -1.0}, "max_drop is -1.0"),
        ({"count": 1, "patience": 0}, "patience is 0"),
        ({"count": 1, "early_stop": 0}, "early_stop is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Levels(**arguments)


def test_something_has_to_say_how_far_to_go() -> None:
    with pytest.raises(ValueError, match=r"give density .* or levels .* max_drop .* may stand alone"):
        Levels(rate=0.3).densities()


def test_a_driver_without_scores_refuses_what_needs_them() -> None:
    Levels(3, rate=0.3).check_fixed("LotteryTicket")
    with pytest.raises(ValueError, match="LotteryTicket trains all levels, and has no max_drop, early_stop"):
        Levels(3, max_drop=0.1, early_stop=2).check_fixed("LotteryTicket")
