"""Means over seeds in words and as curves."""

from workbench.records import Estimate, Interval
from workbench.report.bands import band, sample, spread
from workbench.report.format import metric


def test_means_in_words():
    share = metric("accuracy", "max", [0.9])
    assert spread(Estimate(3, 0.978, interval=Interval(0.9765, 0.9795)), share) == "97.80% ± 0.15"
    assert spread(Estimate(1, 0.978), share) == "97.80%"
    assert spread(None, share) == "—"
    one, many = Estimate(1, 0.5), Estimate(3, 0.5, interval=Interval(0.4, 0.6, 0.9))
    assert sample([1], ["0"], [one]) == "n = 1 seed (0), no interval"
    assert sample([3, 3], ["0", "1", "2"], [many]) == "n = 3 seeds (0, 1, 2), 90% t intervals"
    assert sample([3, 2, None], [], [one, many]) == "n = 2 to 3 seeds, 90% t intervals"
    assert sample([], [], []) == "n not recorded, no interval"


def test_a_curve_without_a_point_is_none():
    assert band("ticket", 0, [(None, Estimate(1, 0.5), False), (0.5, None, False)]) is None
