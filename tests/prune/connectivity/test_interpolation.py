import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune.connectivity import Barrier, barrier, interpolate

State = dict[str, Tensor]


def states(dtype: torch.dtype = torch.float64) -> tuple[State, State]:
    """Two of them, with a mask in common, an infinite entry and a counter."""
    torch.manual_seed(0)
    mask, counts = torch.rand(4, 3) < 0.5, (7, 4)
    return tuple(  # type: ignore[return-value]
        {
            "weight": (torch.randn(4, 3) * mask).to(dtype),
            "bias": torch.tensor([-math.inf, torch.randn(()).item()], dtype=dtype),
            "count": torch.tensor(count),
        }
        for count in counts
    )


# Interpolation


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1))
def test_every_entry_is_the_weighted_mean(alpha: float) -> None:
    a, b = states()
    found = interpolate(a, b, alpha)
    assert list(found) == list(a)
    for x, y, z in zip(a["weight"].flatten().tolist(), b["weight"].flatten().tolist(), found["weight"].flatten()):
        assert z.item() == pytest.approx(alpha * x + (1 - alpha) * y, rel=1e-12, abs=1e-12)
        assert (x or y) or z.item() == 0, "masked in both"
    assert found["bias"][0].item() == -math.inf
    assert found["count"].item() == (7 if alpha >= 0.5 else 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_networks_themselves_in_memory_of_their_own(dtype: torch.dtype) -> None:
    a, b = states(dtype)
    for state, alpha in ((a, 1.0), (b, 0.0)):
        found = interpolate(a, b, alpha)
        for name, value in state.items():
            assert torch.equal(found[name], value)
            assert found[name].dtype == value.dtype
            assert found[name].data_ptr() not in (a[name].data_ptr(), b[name].data_ptr())


def test_what_does_not_fit_together_is_refused() -> None:
    a, b = states()
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        interpolate(a, b, 1.5)
    with pytest.raises(ValueError, match="'extra': in one of the two only"):
        interpolate(a, {**b, "extra": b["bias"]}, 0.5)
    with pytest.raises(ValueError, match=r"'weight' is torch.float64 \(4, 3\) in one and torch.float64 \(3, 4\)"):
        interpolate(a, {**b, "weight": b["weight"].t()}, 0.5)
    with pytest.raises(ValueError, match=r"'count' is torch.int64 \(\) in one and torch.float64 \(\)"):
        interpolate(a, {**b, "count": torch.tensor(1.0).double()}, 0.5)


# Barriers


def point(x: float) -> State:
    return {"x": torch.tensor([x], dtype=torch.float64)}


def test_no_barrier_in_a_convex_valley() -> None:
    found = barrier(lambda state: state["x"].item() ** 2, point(3), point(-3))
    assert found.barrier == found.excess == 0
    assert found.ends == (9, 9)
    assert found.heights[5] == 0
    assert found.stable


def test_ends_of_unlike_height_are_half_their_difference_from_the_mean_and_nothing_above_the_line() -> None:
    found = barrier(lambda state: state["x"].item() ** 2, point(1), point(3), points=5)
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    assert found.heights == (9, 6.25, 4, 2.25, 1)
    assert found.ends == (1, 9)
    assert (found.barrier, found.excess) == (4, 0)


def test_the_height_of_a_double_well() -> None:
    found = barrier(lambda state: (state["x"].item() ** 2 - 1) ** 2, point(1), point(-1))
    assert found.barrier == found.excess == 1
    assert not found.stable


class Line(nn.Module):
    """Relu(w1 x) v1 + relu(w2 x) v2; x itself for w = v = (1, -1), however the two units are called."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 2, bias=False).double(), nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[order]
            self.inner.weight.copy_(signs[:, None])
            self.outer.weight.copy_(signs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).relu())


def test_a_permuted_network_is_the_same_function_behind_a_barrier_that_is_known() -> None:
    """In the middle all weights are 0, and the squared error is the mean of x^2."""
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    model, same = Line([0, 1]), Line([1, 0])
    assert torch.equal(model(x), same(x))

    def error(state: State) -> float:
        model.load_state_dict(state)
        return (model(x) - x).square().mean().item()

    mine = model.state_dict()  # the very tensors that `error` writes to
    found = barrier(error, mine, same.state_dict())
    assert found.ends == (0, 0)
    assert found.barrier == pytest.approx(x.square().mean().item(), rel=1e-12)
    expected = [((1 - (2 * alpha - 1) ** 2) ** 2) * x.square().mean().item() for alpha in found.alphas]
    assert found.heights == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=9))
def test_the_numbers_are_those_of_the_definition(heights: list[float]) -> None:
    last = len(heights) - 1
    found = Barrier(tuple(step / last for step in range(last + 1)), tuple(heights))
    assert found.barrier == pytest.approx(max(heights) - (heights[0] + heights[-1]) / 2)
    above = [h - (heights[0] + (heights[-1] - heights[0]) * i / last) for i, h in enumerate(heights)]
    assert found.excess == pytest.approx(max(0, *above[1:-1]), abs=1e-12)
    assert found.stable == (found.barrier < 0.02)


def test_what_diverged_is_told() -> None:
    infinite = Barrier((0, 0.5, 1), (0.1, math.inf, 0.1))
    assert infinite.barrier == infinite.excess == math.inf
    lost = Barrier((0, 0.5, 1), (0.1, math.nan, 0.1))
    assert math.isnan(lost.barrier)
    assert math.isnan(lost.excess)
    assert not lost.stable


def test_too_few_points_are_refused() -> None:
    def never(_: Any) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="points is 2: give 3 or more"):
        barrier(never, point(1), point(2), points=2)
