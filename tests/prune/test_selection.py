import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune.selection import keep_top_k, top_k_mask
from prune.structure import Unstructured


def naive(scores: dict[str, Tensor], k: int, within: dict[str, Tensor] | None = None) -> dict[str, list[bool]]:
    """Sort everything by (score descending, parameter, index) and take k."""
    places = [
        (-float(value), number, index, name)
        for number, (name, score) in enumerate(scores.items())
        for index, value in enumerate(score.flatten().double().tolist())
        if within is None or within[name].flatten()[index]
    ]
    chosen = {(name, index) for *_, index, name in sorted(places)[:k]}
    return {name: [(name, i) in chosen for i in range(score.numel())] for name, score in scores.items()}


def as_lists(masks: dict[str, Tensor]) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


# Few distinct values, so that most examples are decided by ties; infinities and zeros of both signs too.
values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.inf, -math.inf])
tensors = st.lists(values, min_size=1, max_size=12).map(torch.tensor)
several = st.lists(tensors, min_size=1, max_size=4).map(lambda ts: {f"p{i}": t for i, t in enumerate(ts)})


@settings(deadline=None)
@given(several, st.data())
def test_agrees_with_a_sort_and_keeps_exactly_k(scores: dict[str, Tensor], data: st.DataObject):
    within = None
    if data.draw(st.booleans()):
        within = {
            name: torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))))
            for name, s in scores.items()
        }
    candidates = sum(len(s) if within is None else int(within[n].sum()) for n, s in scores.items())
    k = data.draw(st.integers(0, candidates))
    masks = keep_top_k(scores, k, within)
    assert as_lists(masks) == naive(scores, k, within)
    assert sum(int(mask.sum()) for mask in masks.values()) == k
    assert list(masks) == list(scores)


@settings(deadline=None)
@given(several, st.data())
def test_fewer_places_are_nested_in_more(scores: dict[str, Tensor], data: st.DataObject):
    total = sum(len(s) for s in scores.values())
    few, many = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    small, large = keep_top_k(scores, few), keep_top_k(scores, many)
    assert all(bool((~small[name] | large[name]).all()) for name in scores)
    assert as_lists(keep_top_k(scores, few, large)) == as_lists(small)


def test_ties_go_to_the_first_parameter_then_the_lower_index():
    """Pitfall 5: of 8 tied weights, `score > threshold` keeps none when asked for 4."""
    masks = keep_top_k({"z": torch.ones(3), "a": torch.ones(5)}, 4)
    assert as_lists(masks) == {"z": [True] * 3, "a": [True] + [False] * 4}


@pytest.mark.parametrize("k", [0, 1, 500_000, 999_999, 1_000_000])
def test_a_million_equal_scores(k: int):
    mask = keep_top_k({"w": torch.full((1000, 1000), 0.25)}, k)["w"].flatten()
    assert bool(mask[:k].all())
    assert not mask[k:].any()


def test_half_precision_scores_are_still_exact():
    """Pitfall 5: bf16 has 1,927 distinct magnitudes in a million weights, so thresholds are ties."""
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().abs()
    assert len(scores.unique()) < 2000
    for k in (1, 12_345, 50_000, 99_999):
        assert int(keep_top_k({"w": scores}, k)["w"].sum()) == k


def test_float64_is_not_rounded():
    close = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert keep_top_k({"a": torch.zeros(2), "b": close}, 1)["b"].tolist() == [False, True, False]


def test_scores_outside_within_are_not_looked_at():
    scores = {"w": torch.tensor([math.nan, math.inf, 1.0, 2.0])}
    within = {"w": torch.tensor([False, False, True, True])}
    assert keep_top_k(scores, 1, within)["w"].tolist() == [False, False, False, True]


def test_a_candidate_at_minus_infinity_is_still_a_candidate():
    scores = {"w": torch.full((4,), -math.inf)}
    within = {"w": torch.tensor([False, True, False, True])}
    assert keep_top_k(scores, 1, within)["w"].tolist() == [False, True, False, False]
    assert keep_top_k(scores, 2, within)["w"].tolist() == [False, True, False, True]


def test_nan_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1 of 2 scores of 'bad' are NaN"):
        keep_top_k({"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan])}, 1)


def test_masks_have_memory_of_their_own():
    masks = keep_top_k({"a": torch.ones(4), "b": torch.ones(4)}, 8)
    assert masks["a"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k: int):
    with pytest.raises(ValueError, match=f"cannot keep {k} of 3"):
        keep_top_k({"w": torch.ones(3)}, k)
    with pytest.raises(ValueError, match="of 1 candidates"):
        keep_top_k({"w": torch.ones(3)}, 2, {"w": torch.tensor([True, False, False])})


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no scores"):
        keep_top_k({}, 0)
    with pytest.raises(ValueError, match=r"scores of 'w' are torch\.int64"):
        keep_top_k({"w": torch.arange(3)}, 1)
    with pytest.raises(ValueError, match="'w' is missing there"):
        keep_top_k({"w": torch.ones(3)}, 1, {"v": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) there"):
        keep_top_k({"w": torch.ones(3)}, 1, {"w": torch.ones(2, dtype=torch.bool)})


def test_rows_are_selected_apart_in_one_call():
    """Packed training: one call selects for a batch of models, as many calls would."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (3, 2, 40), generator=generator).float()
    alive = torch.rand(3, 2, 40, generator=generator) > 0.3
    k = int(alive.sum(-1).min()) - 2
    together = top_k_mask(scores, k, alive)
    assert together.sum(-1).unique().tolist() == [k]
    for i in range(3):
        for j in range(2):
            assert torch.equal(together[i, j], top_k_mask(scores[i, j], k, alive[i, j]))


def test_unstructured_takes_one_total_or_one_number_per_tensor():
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([[2.0], [1.0]])}
    assert as_lists(Unstructured()(scores, 2)) == {"a": [True, True, False], "b": [False, False]}
    apart = Unstructured()(scores, {"a": 1, "b": 1})
    assert as_lists(apart) == {"a": [True, False, False], "b": [True, False]}
    assert apart["b"].shape == (2, 1)
    within = {"a": torch.tensor([False, True, True]), "b": torch.tensor([[False], [True]])}
    inside = Unstructured()(scores, {"a": 1, "b": 1}, within)
    assert as_lists(inside) == {"a": [False, True, False], "b": [False, True]}
    with pytest.raises(ValueError, match="name the same tensors"):
        Unstructured()(scores, {"a": 1})
