import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prune.masks import Masks

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def of(layers: list[list[tuple[bool, bool]]]) -> tuple[Masks, Masks]:
    return tuple(  # type: ignore[return-value]
        Masks({f"layer{i}": torch.tensor([pair[which] for pair in layer]) for i, layer in enumerate(layers)})
        for which in (0, 1)
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(BITS, min_size=1, max_size=3))
def test_counts_and_indices_are_those_of_sets(layers: list[list[tuple[bool, bool]]]) -> None:
    first, second = of(layers)
    a = {(i, j) for i, layer in enumerate(layers) for j, pair in enumerate(layer) if pair[0]}
    b = {(i, j) for i, layer in enumerate(layers) for j, pair in enumerate(layer) if pair[1]}
    overlap = first.overlap(second)
    assert (overlap.weights, overlap.first, overlap.second, overlap.both) == (
        sum(map(len, layers)),
        len(a),
        len(b),
        len(a & b),
    )
    assert overlap.jaccard == (len(a & b) / len(a | b) if a | b else 1)
    assert overlap.coefficient == (len(a & b) / min(len(a), len(b)) if a and b else 1)
    assert overlap.hamming == len(a ^ b) / sum(map(len, layers)) == second.overlap(first).hamming


@settings(deadline=None, max_examples=50)
@given(BITS)
def test_one_layer_has_the_exact_tail_of_the_hypergeometric_distribution(layer: list[tuple[bool, bool]]) -> None:
    overlap = Masks.layer_overlaps(*of([layer]))["layer0"]
    law = stats.hypergeom(len(layer), overlap.first, overlap.second)
    assert overlap.p == pytest.approx(law.sf(overlap.both - 1), rel=1e-9)
    assert overlap == Masks.overlap(*of([layer]))
    if 0 < overlap.first < len(layer) and 0 < overlap.second < len(layer):
        counts = np.arange(len(layer) + 1)
        mean = law.pmf(counts) @ counts
        deviation = math.sqrt(law.pmf(counts) @ (counts - mean) ** 2)
        assert overlap.z == pytest.approx((overlap.both - mean) / deviation, abs=1e-9)
    else:
        assert (overlap.z, overlap.p) == (None, 1)


def test_several_layers_are_near_the_exact_distribution_of_the_sum() -> None:
    torch.manual_seed(0)
    sizes, densities = (300, 200, 40), (0.2, 0.4, 0.5)
    first, second = (
        Masks({f"layer{i}": torch.rand(n) < d for i, (n, d) in enumerate(zip(sizes, densities))}) for _ in range(2)
    )
    overlap, exact = first.overlap(second), np.ones(1)
    for n, each in zip(sizes, first.layer_overlaps(second).values()):
        exact = np.convolve(exact, stats.hypergeom(n, each.first, each.second).pmf(np.arange(n + 1)))
    mean = exact @ np.arange(len(exact))
    deviation = math.sqrt(exact @ (np.arange(len(exact)) - mean) ** 2)
    assert overlap.z == pytest.approx((overlap.both - mean) / deviation, rel=1e-6)
    assert overlap.p == pytest.approx(exact[overlap.both :].sum(), abs=0.005)


def test_tickets_that_share_far_more_than_chance_in_a_large_layer() -> None:
    torch.manual_seed(0)
    first = torch.rand(1000, 300) < 0.1
    second = (first & (torch.rand(1000, 300) < 0.2)) | (torch.rand(1000, 300) < 0.08)
    overlap = Masks({"w": first}).overlap(Masks({"w": second}))
    assert overlap.z is not None
    assert overlap.z > 30
    assert overlap.p < 1e-200
    apart = Masks({"w": first}).overlap(Masks({"w": ~first}))
    assert (apart.both, apart.jaccard, apart.p) == (0, 0, 1)


def test_nested_masks_have_a_coefficient_of_one() -> None:
    outer, inner = Masks({"w": torch.tensor([True, True, False])}), Masks({"w": torch.tensor([True, False, False])})
    overlap = outer.overlap(inner)
    assert (overlap.coefficient, overlap.jaccard) == (1, 0.5)


def test_masks_of_other_parameters_are_refused() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="for different parameters"):
        Masks({"a": mask}).overlap(Masks({"b": mask}))
    with pytest.raises(ValueError, match="has shape"):
        Masks({"a": mask}).layer_overlaps(Masks({"a": mask[:2]}))


def test_the_relative_distance_is_one_by_chance_and_nought_of_the_same() -> None:
    torch.manual_seed(0)
    first, second = (
        Masks({f"layer{i}": torch.rand(n) < d for i, (n, d) in enumerate(((40_000, 0.02), (20_000, 0.5)))})
        for _ in range(2)
    )
    each = [layer.relative for layer in first.layer_overlaps(second).values()]
    assert [*each, first.overlap(second).relative] == pytest.approx([1, 1, 1], abs=0.06)
    assert first.overlap(second).hamming == pytest.approx((2 * 0.02 * 0.98 * 4 + 2 * 0.5 * 0.5 * 2) / 6, rel=0.06)
    assert first.overlap(first).relative == 0
    full = Masks({"layer0": torch.ones(3, dtype=torch.bool)})
    assert full.overlap(full).relative == 0
    inverse = Masks({name: ~mask for name, mask in first.items()})
    assert first.overlap(inverse).relative > 1
