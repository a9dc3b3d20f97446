from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune.schedule import SCHEDULES, cubic, exponential, geometric, kept, levels_to, linear, one_shot

densities = st.floats(min_value=1e-6, max_value=1)


@pytest.mark.parametrize(
    ("total", "density", "expected"),
    [
        (100, 0.07, 7),  # 7.000000000000001 in binary: a ceiling keeps 8
        (100, 0.29, 29),  # 28.999999999999996 in binary: a floor keeps 28
        (5, 0.5, 3),  # round(2.5) is 2
        (7, 0.5, 4),  # round(3.5) is 4 too
        (10, 0.15, 2),  # 1.5; the float 0.15 is just below
        (3, 0.1, 0),
        (0, 0.5, 0),
        (2**60, 0.5, 2**59),
    ],
)
def test_kept_rounds_halves_up_on_the_decimal_that_was_written(total: int, density: float, expected: int):
    assert kept(total, density) == expected


@given(st.integers(0, 10**12), densities)
def test_kept_agrees_with_decimal_arithmetic(total: int, density: float):
    exact = Decimal(total) * Decimal(repr(density))
    assert kept(total, density) == int(exact.to_integral_value(ROUND_HALF_UP))


@given(st.integers(0, 10**6), densities, densities)
def test_kept_never_grows_as_the_density_falls(total: int, a: float, b: float):
    low, high = sorted((a, b))
    assert 0 <= kept(total, low) <= kept(total, high) <= kept(total, 1.0) == total


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_density_out_of_range(density: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        kept(10, density)  # type: ignore[arg-type]


def test_negative_total():
    with pytest.raises(ValueError, match="total is -1"):
        kept(-1, 0.5)


def test_geometric_is_indexed_by_level_and_exact():
    assert geometric(0.3, 2) == [1.0, 0.7, 0.49]  # 0.7 ** 2 is 0.48999999999999994
    assert geometric(0.2, 0) == [1.0]
    assert geometric(0, 3) == [1.0] * 4
    assert geometric(0.2, 15)[15] == pytest.approx(0.8**15, rel=1e-12)


def test_levels_count_from_the_original_total():
    """Pitfall 5: 10 weights at rate 0.25; rounding level by level would give 10, 8, 6, 5, 4, 3."""
    compounded = [10]
    for _ in range(5):
        compounded.append(kept(compounded[-1], 0.75))
    exact = [kept(10, density) for density in geometric(0.25, 5)]
    assert exact == [10, 8, 6, 4, 3, 2]
    assert compounded != exact


@given(st.integers(0, 60), st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 0.9]))
def test_levels_to_finds_its_own_level(level: int, rate: float):
    assert levels_to(geometric(rate, level)[level], rate) == level
    assert levels_to((1 - rate) ** level, rate) == level


@given(densities, st.floats(min_value=0.01, max_value=0.99))
def test_levels_to_is_the_first_level_dense_enough(density: float, rate: float):
    level = levels_to(density, rate)
    assert (1 - rate) ** level <= density * (1 + 1e-6)
    assert level == 0 or (1 - rate) ** (level - 1) > density


def test_rate_zero_reaches_only_one():
    assert levels_to(1.0, 0.0) == 0
    with pytest.raises(ValueError, match="never reaches"):
        levels_to(0.5, 0.0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rate_out_of_range(rate: float):
    with pytest.raises(ValueError, match="rate is"):
        geometric(rate, 1)
    with pytest.raises(ValueError, match="rate is"):
        levels_to(0.5, rate)


def test_levels_out_of_range():
    with pytest.raises(ValueError, match="levels is -1"):
        geometric(0.2, -1)
    with pytest.raises(ValueError, match="leave nothing"):
        geometric(0.9, 400)


# The way to a density

Way = Callable[[float, float, float], float]


def test_schedules_are_found_by_name():
    assert {"one_shot": one_shot, "cubic": cubic, "geometric": exponential, "linear": linear} == SCHEDULES


@given(densities, densities, st.floats(0, 1), st.floats(0, 1))
@pytest.mark.parametrize("way", SCHEDULES.values())
def test_a_way_falls_from_its_start_to_its_end(way: Way, a: float, b: float, p: float, q: float):
    (last, first), (early, late) = sorted((a, b)), sorted((p, q))
    assert way(0.0, last, first) == (last if way is one_shot else first)
    assert way(1.0, last, first) == last
    assert first >= way(early, last, first) >= way(late, last, first) * (1 - 1e-15)
    assert way(late, last, first) >= last


def test_ways_agree_with_their_equations():
    for p in (0.0, 0.1, 0.35, 0.5, 0.9, 1.0):
        sparsity = 0.9 + (0.2 - 0.9) * (1 - p) ** 3  # Zhu and Gupta 2017, equation 1
        assert cubic(p, 0.1, 0.8) == pytest.approx(1 - sparsity)
        assert linear(p, 0.1, 0.8) == pytest.approx((1 - p) * 0.8 + p * 0.1)
        assert exponential(p, 0.01) == pytest.approx(100**-p)  # Tanaka et al. 2020, algorithm 1: rho^(-k/n)
        assert one_shot(p, 0.1, 0.8) == 0.1


@given(st.integers(1, 20), st.sampled_from([0.1, 0.2, 0.5]))
def test_an_exponential_way_in_equal_steps_is_geometric(levels: int, rate: float):
    end = geometric(rate, levels)[-1]
    way = [exponential(level / levels, end) for level in range(levels + 1)]
    assert way == pytest.approx(geometric(rate, levels), rel=1e-12)


@pytest.mark.parametrize("way", SCHEDULES.values())
def test_a_way_out_of_range(way: Way):
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="progress is"):
            way(progress, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"initial density 0\.2 is below the final one, 0\.5"):
        way(0.5, 0.5, 0.2)
    with pytest.raises(ValueError, match="density is 0"):
        way(0.5, 0, 1.0)


@pytest.mark.parametrize("density", ["0.1", None, True, [0.1]])
def test_a_density_that_is_no_number_is_refused(density: object) -> None:
    with pytest.raises(ValueError, match=r"density is .*: give the share of weights to keep"):
        kept(10, density)  # type: ignore[arg-type]
