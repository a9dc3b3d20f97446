"""What a hunt trains and measures beside the ticket."""

from typing import Any

import pytest

from prune.tickets.controls import Controls, Interpolation


def test_a_bare_true_is_the_default_line() -> None:
    assert Controls().interpolation is None
    assert Controls(connectivity=True).interpolation == Interpolation() == Interpolation(11, ("val",))
    assert Controls(connectivity=Interpolation(30, ["train", "test"])).interpolation.splits == ("train", "test")  # type: ignore


def test_barriers_of_another_line_are_none_of_this_one() -> None:
    line = Interpolation(3, ("train", "test"))
    barrier = {"alphas": [0, 0.5, 1]}
    assert line.measured({"test": barrier, "train": barrier})
    assert not line.measured({"train": barrier})
    assert not line.measured({"train": barrier, "test": {"alphas": [0, 1]}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"points": 2}, "connectivity.points is 2: give 3 or more"),
        ({"points": True}, "connectivity.points is True"),
        ({"split": "dev"}, r"connectivity.split is 'dev': give one of \['train', 'val', 'test'\]"),
        ({"split": ()}, r"connectivity.split is \(\)"),
        ({"split": ("val", "val")}, "each once"),
    ],
)
def test_what_is_no_line_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interpolation(**given)
