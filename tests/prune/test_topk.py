import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune import topk
from prune.topk import keep_top_k
from tests.helpers.ranks import on_ranks


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


def test_denormal_scores_are_told_apart_where_arithmetic_takes_them_for_zero():
    scores = torch.arange(10, dtype=torch.int32).view(torch.float32)
    torch.set_flush_denormal(True)
    try:
        mask = keep_top_k({"w": scores}, 4)["w"]
    finally:
        torch.set_flush_denormal(False)
    assert mask.tolist() == [False] * 6 + [True] * 4


any_bits = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0])
any_float = st.one_of(any_bits, values).filter(lambda value: not math.isnan(value))


@settings(deadline=None)
@given(st.lists(any_float, min_size=1, max_size=20), st.data())
def test_any_pattern_of_bits_has_its_place(numbers: list[float], data: st.DataObject):
    """Denormals, both zeros, neighbours that share their highest 16 bits, both signs."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scores = {"w": torch.tensor(numbers, dtype=dtype), "v": torch.tensor(numbers[::-1], dtype=torch.float32)}
    neighbour = torch.nextafter(scores["w"], torch.tensor(math.inf, dtype=dtype))
    scores["n"] = neighbour.where(neighbour.isfinite(), 0)
    k = data.draw(st.integers(0, 3 * len(numbers)))
    assert as_lists(keep_top_k(scores, k)) == naive(scores, k)


def test_a_tensor_of_less_precision_is_compared_in_that_of_the_others():
    exact = torch.tensor([0.1], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = exact.to(dtype)
        assert rounded.double() != exact
        mask = keep_top_k({"exact": exact, "rounded": rounded}, 1)
        assert bool(mask["rounded"]) == bool(rounded.double() > exact)


def test_many_chunks_are_one_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "_CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randint(-2, 3, (5, 8), generator=generator).float().t(),
        "b": torch.randint(-2, 3, (7,), generator=generator).bfloat16(),
        "none": torch.zeros(0, 3),
    }
    within = {name: torch.rand(score.shape, generator=generator) > 0.3 for name, score in scores.items()}
    for k in range(25):
        assert as_lists(keep_top_k(scores, k, within)) == naive(scores, k, within)
    assert keep_top_k(scores, 3)["a"].is_contiguous()


def shards(cases: list[Any]) -> list[Any]:
    """Masks of scores that lie on two ranks, in other ways from case to case; an error as its message."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    copies = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    ways: list[Any] = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (grid, [Replicate(), Shard(0)]),
        (copies, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Shard(1)]),
    ]
    found: list[Any] = []
    for shift, (scores, k, *within) in enumerate(cases):
        placed: dict[str, Tensor] = {
            name: score if name == "plain" else distribute_tensor(score, *ways[(shift + i) % len(ways)])
            for i, (name, score) in enumerate(scores.items())
        }
        try:
            masks = keep_top_k(placed, k, *within)
        except ValueError as error:
            found.append(str(error))
            continue
        assert all(type(mask) is Tensor for mask in masks.values())
        found.append(as_lists(masks))
    with pytest.raises(ValueError, match="holds partial sums: redistribute"):
        keep_top_k({"w": DTensor.from_local(torch.ones(3), line, [Partial()])}, 1)
    return found


def test_shards_of_several_ranks_are_one_model():
    """Shapes that do not divide, empty shards, ties over borders, meshes of two dimensions, plain tensors."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    scores = {"a": drawn(5, 3), "plain": drawn(4), "b": drawn(1, 6), "c": drawn(4, 4), "d": drawn(3, 2, 2)}
    scores["c"][0, 0] = math.inf
    smooth = {name: torch.randn(score.shape, generator=generator).double() for name, score in scores.items()}
    within = {name: torch.rand(score.shape, generator=generator) > 0.4 for name, score in scores.items()}
    spoilt = scores | {"c": scores["c"].clone()}
    spoilt["c"][3, 3] = math.nan
    good = [*[(scores, 20)] * 5, (scores, 53), (scores, 0), (scores, 11, within), (smooth, 17), (smooth, 9, within)]
    first, second = on_ranks(shards, [*good, (spoilt, 3), (scores, 54)])
    assert first == second
    *found, spoilt_message, range_message = first
    for case, masks in zip(good, found):
        assert masks == naive(*case)
    assert spoilt_message.startswith("1 of 16 scores of 'c' are NaN")
    assert range_message.startswith("cannot keep 54 of 53")
