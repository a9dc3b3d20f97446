"""Axes, ticks and labels."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.report import figures
from workbench.report.bands import Band


def test_labels_are_spread_without_crossing():
    assert figures.spread([0.1, 0.9], 0.1) == [0.1, 0.9]
    moved = figures.spread([0.5, 0.52, 0.51, 1.0, 1.0], 0.1)
    order = sorted(range(5), key=lambda i: moved[i])
    assert order == [0, 2, 1, 3, 4]
    assert all(moved[b] - moved[a] >= 0.1 - 1e-9 for a, b in pairwise(order))
    assert min(moved) >= 0
    assert max(moved) <= 1


def test_density_ticks():
    assert figures.ticks(0.01, 1.0) == pytest.approx([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    assert figures.ticks(0.3, 0.4) == [0.2], "the nearest one where none lies between"


def test_axis_leaves_out_the_first_epochs_only_where_they_would_hide_the_rest():
    low, high = figures.window([[0.1, 0.5, 0.9, 0.95, 0.96, 0.97, 0.97, 0.98, 0.98, 0.98]])
    assert 0.8 < low < 0.9
    assert high > 0.98
    assert figures.window([[0.1, 0.2, 0.3, 0.4, 0.5]])[0] < 0.1
    assert figures.window([[0.5]])[0] < 0.5


numbers = st.floats(-10, 10)


@settings(deadline=None, max_examples=60)
@given(
    leads=st.lists(numbers, min_size=2, max_size=8),
    others=st.lists(numbers, min_size=1, max_size=8),
    half=st.floats(0, 100),
)
def test_the_axis_shows_the_tickets_and_is_not_swallowed_by_the_rest(leads, others, half):
    def drawn(y: list[float]) -> Band:
        return Band("", 0, [1.0] * len(y), y, [v - half for v in y], [v + half for v in y], [False] * len(y))

    lead, rest = drawn(leads), drawn(others)
    low, high = figures.reach([lead, rest], [lead])
    inner, outer = figures.window([leads[::-1]])
    assert low <= inner < outer <= high
    assert high - low <= 9 * (outer - inner) * (1 + 1e-9)
    assert low >= min(inner, min([*leads, *others]) - half - 0.03 * (outer - inner)) - 1e-9
