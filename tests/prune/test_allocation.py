import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune.allocation import ALLOCATIONS, ERK, Allocation, ErdosRenyi, Global, Layers, LayerwiseAsPaper, Uniform
from prune.schedule import geometric, kept
from prune.structures.layout import best_of_each
from prune.topk import keep_top_k

LENET = {"fc1": 784 * 300, "fc2": 300 * 100, "out": 100 * 10}


def scores_of(sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


layer_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(
    lambda sizes: {f"p{i}": size for i, size in enumerate(sizes)}
)


def enough(sizes: dict[str, int]) -> st.SearchStrategy[float]:
    """Densities with a place for each layer."""
    return st.floats(min_value=(len(sizes) + 0.5) / (sum(sizes.values()) + 1), max_value=1)


@settings(deadline=None)
@given(layer_sizes, st.data(), st.integers(0, 5))
@pytest.mark.parametrize("allocation", [Global(), Uniform(), Global(floor=0)], ids=str)
def test_total_is_exactly_k(allocation: Allocation, sizes: dict[str, int], data: st.DataObject, seed: int):
    density = data.draw(enough(sizes))
    k = kept(sum(sizes.values()), density)
    if k < len(sizes):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = allocation(Layers(scores_of(sizes, seed), density))
    assert sum(counts.values()) == k
    assert list(counts) == list(sizes)
    least = 0 if allocation == Global(floor=0) else 1
    assert all(least <= count <= sizes[name] for name, count in counts.items())


@settings(deadline=None, max_examples=40)
@given(layer_sizes, st.floats(0.05, 0.6), st.integers(0, 5))
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_levels_nest(name: str, sizes: dict[str, int], rate: float, seed: int):
    """Even with new scores at every level, each level's counts fit into what the last one left."""
    allocation = LayerwiseAsPaper(rate=rate) if name == "layerwise" else ALLOCATIONS[name]()
    within = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level, density in enumerate(geometric(rate, 6)[1:]):
            if kept(sum(sizes.values()), density) < len(sizes):
                return
            scores = scores_of(sizes, seed + level)
            counts = allocation(Layers(scores, density, within=within))
            masks = best_of_each(scores, counts, within)
            if within is not None:
                assert all(bool((~masks[n] | within[n]).all()) for n in sizes)
            within = masks


def test_global_without_a_weak_layer_is_the_global_top_k():
    scores = scores_of({"a": 300, "b": 500})
    assert Global()(Layers(scores, 0.2)) == {n: int(m.sum()) for n, m in keep_top_k(scores, 160).items()}


def collapsing() -> dict[str, Tensor]:
    """The second layer's scores are scaled so that nothing in it is among the top fifth."""
    scores = scores_of({"a": 400, "weak": 300, "c": 300})
    return scores | {"weak": scores["weak"] * 0.2}


def test_floor_holds_a_collapsing_layer_and_says_so():
    """Pitfall 7: at 80% global, a layer scaled by 0.2 kept 0 weights."""
    scores = collapsing()
    assert int(keep_top_k(scores, 200)["weak"].sum()) == 0
    with pytest.warns(UserWarning, match=r"layer collapse: 'weak' would have kept 0 of 300; it keeps 6, by floor 0\.1"):
        counts = Global()(Layers(scores, 0.2))
    rest = keep_top_k({n: scores[n] for n in ("a", "c")}, 194)
    assert counts == {"a": int(rest["a"].sum()), "weak": 6, "c": int(rest["c"].sum())}


@pytest.mark.parametrize(("floor", "weak"), [(1, 1), (50, 50), (0.5, 30), (0.9, 54), (0.0001, 1)])
def test_floor_as_number_or_share_of_the_fair_part(floor: float, weak: int):
    with pytest.warns(UserWarning, match="'weak'"):
        counts = Global(floor)(Layers(collapsing(), 0.2))
    assert counts["weak"] == weak
    assert sum(counts.values()) == 200


@pytest.mark.parametrize("floor", [0, 0.0])
def test_without_a_floor_a_dead_layer_is_still_reported(floor: float):
    with pytest.warns(UserWarning, match="'weak' keeps none of its 300"):
        assert Global(floor)(Layers(collapsing(), 0.2))["weak"] == 0


def test_lifting_one_layer_may_push_another_below_its_floor():
    scores = {
        "strong": torch.full((6,), 9.0),
        "middle": torch.tensor([5.0, 4.0, 0.0]),
        "weak": torch.tensor([1.0, 1.0, 1.0]),
    }
    assert [int(m.sum()) for m in keep_top_k(scores, 8).values()] == [6, 2, 0]
    with pytest.warns(UserWarning, match="layer collapse") as caught:
        counts = Global(2)(Layers(scores, 8 / 12))
    assert counts == {"strong": 4, "middle": 2, "weak": 2}
    assert [str(w.message).split("'")[1] for w in caught] == ["weak", "middle"]


@pytest.mark.parametrize("floor", [0, 0.1, 0.5, 2])
@pytest.mark.parametrize("halved", [False, True])
def test_what_is_selected_is_what_the_counts_select(floor: float, halved: bool):
    """Ties and layers at their floor included."""
    scores = {name: (score * 20).round() for name, score in collapsing().items()}
    within = {name: torch.arange(len(score)) % 2 == 0 for name, score in scores.items()} if halved else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, selected = (way(Layers(scores, 0.2, within)) for way in (Global(floor), Global(floor).select))
    expected = best_of_each(scores, counts, within)
    assert list(selected) == list(scores)
    assert all(torch.equal(selected[name], expected[name]) for name in scores)


def test_floor_asks_for_no_more_than_is_left():
    scores = scores_of({"a": 10, "b": 10})
    within = {"a": torch.ones(10, dtype=torch.bool), "b": torch.tensor([True] + [False] * 9)}
    scores["b"][0] = 0
    with pytest.warns(UserWarning, match="'b' would have kept 0"):
        assert Global(5)(Layers(scores, 0.4, within=within)) == {"a": 7, "b": 1}
    within["b"][0] = False
    with pytest.warns(UserWarning, match="'b' keeps none"):
        assert Global(5)(Layers(scores, 0.4, within=within)) == {"a": 8, "b": 0}


def test_impossible_totals():
    scores = scores_of({"a": 10, "b": 10})
    with pytest.raises(ValueError, match="floor 5 needs 10 over 2 layers"):
        Global(5)(Layers(scores, 0.4))
    with pytest.raises(ValueError, match="keeps none"):
        Global()(Layers(scores, 0.01))
    with pytest.raises(ValueError, match="too few for one in each of 2"):
        Uniform()(Layers(scores, 0.05))
    within = {"a": torch.ones(10, dtype=torch.bool), "b": torch.tensor([True] + [False] * 9)}
    with pytest.raises(ValueError, match="only 11 left"):
        Global()(Layers(scores, 0.7, within=within))
    for allocation in (Uniform(), LayerwiseAsPaper()):
        with pytest.raises(ValueError, match=r"of 'b', but `within` has only 1 left"):
            allocation(Layers(scores, 0.4, within=within))
    for allocation in (Global(), Uniform(), LayerwiseAsPaper()):
        with pytest.raises(ValueError, match="no layers"):
            allocation(Layers({}, 0.5))


@pytest.mark.parametrize("floor", [-1, 1.5, -0.1, float("nan"), True])
def test_bad_floor(floor: float):
    with pytest.raises(ValueError, match="floor is"):
        Global(floor)


@settings(deadline=None)
@given(layer_sizes, st.data())
def test_uniform_is_the_webster_apportionment(sizes: dict[str, int], data: st.DataObject):
    density = data.draw(enough(sizes))
    k = kept(sum(sizes.values()), density)
    if k < len(sizes):
        return
    # Oracle: one place to each layer, then place by place to the highest size / (2 places + 1).
    expected = dict.fromkeys(sizes, 1)
    for _ in range(k - len(sizes)):
        open_ = [n for n in sizes if expected[n] < sizes[n]]
        best = max(open_, key=lambda n: sizes[n] / (2 * expected[n] + 1))
        expected[best] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Uniform()(Layers(scores_of(sizes), density)) == expected


def test_uniform_is_within_one_weight_of_the_density():
    counts = Uniform()(Layers(scores_of({f"p{i}": 25 for i in range(8)}), 0.1))
    assert sorted(counts.values()) == [2, 2, 2, 2, 3, 3, 3, 3]  # each alone would round 2.5 up: 24, not 20
    assert list(counts.values()) == [3, 3, 3, 3, 2, 2, 2, 2]


def test_a_layer_that_rounds_up_to_one_is_no_collapse():
    assert Uniform()(Layers(scores_of({"small": 7, "big": 93}), 0.1)) == {"small": 1, "big": 9}  # and no warning


@pytest.mark.parametrize("allocation", [Uniform(), LayerwiseAsPaper(output_rate=1)], ids=str)
def test_a_layer_too_small_for_the_density_keeps_one(allocation: Allocation):
    scores = scores_of({"big": 96, "tiny": 4, "out": 100})
    with pytest.warns(UserWarning, match="'tiny' would have kept 0 of 4"):
        counts = allocation(Layers(scores, 0.1))
    assert counts["tiny"] == 1


@pytest.mark.parametrize(("rounds", "percent"), [(3, 51.3), (7, 21.1), (12, 7.0), (15, 3.6), (18, 1.9)])
def test_layerwise_reproduces_the_paper(rounds: int, percent: float):
    """The percentages left that Frankle and Carbin 2019 give for LeNet-300-100 at 20% per round."""
    density = geometric(0.2, rounds)[rounds]
    counts = LayerwiseAsPaper()(Layers(scores_of(LENET), density))
    assert counts == {
        "fc1": kept(LENET["fc1"], density),
        "fc2": kept(LENET["fc2"], density),
        "out": kept(LENET["out"], geometric(0.1, rounds)[rounds]),
    }
    assert round(100 * sum(counts.values()) / sum(LENET.values()), 1) == percent


def test_output_density_between_its_ends():
    assert LayerwiseAsPaper().output_density(1.0) == 1.0
    assert LayerwiseAsPaper().output_density(0.8**2) == 0.81
    assert LayerwiseAsPaper(output_rate=0).output_density(0.01) == 1.0
    assert LayerwiseAsPaper(output_rate=1).output_density(0.37) == pytest.approx(0.37)
    halfway = LayerwiseAsPaper().output_density(0.8**2.5)
    assert halfway == pytest.approx(0.9**2.5)


# Erdos-Renyi

KINDS = {"erk": ERK(), "erdos_renyi": ErdosRenyi()}
dimensions = st.lists(
    st.one_of(st.tuples(*[st.integers(1, 12)] * 2), st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2)),
    min_size=1,
    max_size=5,
).map(lambda shapes: {f"p{i}": shape for i, shape in enumerate(shapes)})


def published(shapes: dict[str, tuple[int, ...]], density: float, kernel: bool) -> dict[str, float]:
    """Densities as the code of RigL and jaxpruner find them: eps * raw, and layers where that is above 1 are dense,
    the highest first, until none is."""
    raw = {n: (sum(s) if kernel else sum(s[:2])) / math.prod(s if kernel else s[:2]) for n, s in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [n for n in shapes if n not in dense]
        places = density * sum(map(math.prod, shapes.values())) - sum(math.prod(shapes[n]) for n in dense)
        eps = places / sum(raw[n] * math.prod(shapes[n]) for n in sparse) if sparse else 0.0
        highest = max((raw[n] for n in sparse), default=0.0)
        if eps * highest <= 1 + 1e-12:
            return {n: 1.0 if n in dense else eps * raw[n] for n in shapes}
        dense |= {n for n in sparse if raw[n] == highest}


@settings(deadline=None)
@given(dimensions, st.floats(0.05, 1))
@pytest.mark.parametrize("name", KINDS)
def test_erdos_renyi_is_the_published_rule(name: str, shapes: dict[str, tuple[int, ...]], density: float):
    """Exactly k in all; each layer within about a weight of its published share, but for those lifted to 1."""
    scores = {n: torch.rand(shape) for n, shape in shapes.items()}
    total = kept(sum(map(math.prod, shapes.values())), density)
    if total < len(shapes):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = KINDS[name](Layers(scores, density))
    assert sum(counts.values()) == total
    shares = {n: share * math.prod(shapes[n]) for n, share in published(shapes, density, name == "erk").items()}
    if min(shares.values()) >= 0.5:
        assert all(abs(counts[n] - shares[n]) <= 1 + 0.5 * len(shapes) for n in shapes)
    given = dict.fromkeys(shapes, 1)  # oracle: place by place to the highest weight / (2 places + 1)
    weight = {n: Fraction(sum(s) if name == "erk" else sum(s[:2]) * math.prod(s[2:])) for n, s in shapes.items()}
    for _ in range(total - len(given)):
        best = max((n for n in shapes if given[n] < math.prod(shapes[n])), key=lambda n: weight[n] / (2 * given[n] + 1))
        given[best] += 1
    assert counts == given


def test_erk_of_a_small_network_by_hand():
    """Weights in proportion to 3 + 2 + 3 + 3, 4 + 8 and 8 + 2; the last layer is dense, the others share 39."""
    shapes = {"conv": (3, 2, 3, 3), "fc": (4, 8), "out": (2, 4)}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert ERK()(Layers(scores, 0.5)) == {"conv": 19, "fc": 20, "out": 8}
    assert published(shapes, 0.5, True) == pytest.approx({"conv": 39 * 11 / 23 / 54, "fc": 39 * 12 / 23 / 32, "out": 1})
    assert ErdosRenyi()(Layers(scores, 0.5)) == {"conv": 34, "fc": 9, "out": 4}  # 47 in the proportion of 45, 12 and 6


def test_a_key_of_several_matrices_has_the_density_of_all_together():
    units = {"attention": torch.rand(8), "ffn": torch.rand(16)}
    shapes = {"attention": [(16, 16)] * 4, "ffn": [(16, 16), (16, 16)]}
    assert ERK()(Layers(units, 0.5, shapes=shapes)) == {"attention": 4, "ffn": 8}
    thin = {"attention": [(16, 16)] * 4, "ffn": [(4, 16), (16, 4)]}  # twice and a half as dense
    assert ERK()(Layers(units, 0.5, shapes=thin)) == {"attention": 2, "ffn": 10}


def test_erk_takes_no_more_than_is_left():
    scores = {"a": torch.rand(10, 10), "b": torch.rand(10, 10)}
    within = {"a": torch.zeros(10, 10, dtype=torch.bool), "b": torch.ones(10, 10, dtype=torch.bool)}
    within["a"][0] = True
    assert ERK()(Layers(scores, 0.4, within=within)) == {"a": 10, "b": 70}
    within["a"][0] = False
    assert ERK()(Layers(scores, 0.4, within=within)) == {"a": 0, "b": 80}
    with pytest.raises(ValueError, match="only 100 left"):
        ERK()(Layers(scores, 0.6, within=within))


def test_no_output_is_slower_where_there_is_none():
    scores = scores_of({"a": 100, "b": 100})
    assert LayerwiseAsPaper()(Layers(scores, 0.8, outputs=[])) == {"a": 80, "b": 80}


def test_outputs_are_the_last_layer_or_those_named():
    scores = scores_of({"a": 100, "b": 100, "c": 100})
    assert LayerwiseAsPaper()(Layers(scores, 0.8)) == {"a": 80, "b": 80, "c": 90}
    assert LayerwiseAsPaper()(Layers(scores, 0.8, outputs=["a", "b"])) == {"a": 90, "b": 90, "c": 80}
    with pytest.raises(ValueError, match="'d'"):
        LayerwiseAsPaper()(Layers(scores, 0.8, outputs=["d"]))


@pytest.mark.parametrize("fields", [{"output_rate": -0.1}, {"output_rate": 1.1}, {"rate": 0}, {"rate": 1}])
def test_bad_rates(fields: dict[str, float]):
    with pytest.raises(ValueError, match="rate is"):
        LayerwiseAsPaper(**fields)
