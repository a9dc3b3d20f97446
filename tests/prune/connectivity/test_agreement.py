import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prune.connectivity import agreement, layer_agreements
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
    found = agreement(first, second)
    assert (found.weights, found.first, found.second, found.both) == (sum(map(len, layers)), len(a), len(b), len(a & b))
    assert found.jaccard == (len(a & b) / len(a | b) if a | b else 1) == first.overlap(second)
    assert found.coefficient == (len(a & b) / min(len(a), len(b)) if a and b else 1)
    assert found.chance == pytest.approx(first.chance_overlap(second))
    assert first.distance(second) == len(a ^ b) / sum(map(len, layers)) == second.distance(first)


@settings(deadline=None, max_examples=50)
@given(BITS)
def test_one_layer_has_the_exact_tail_of_the_hypergeometric_distribution(layer: list[tuple[bool, bool]]) -> None:
    found = layer_agreements(*of([layer]))["layer0"]
    law = stats.hypergeom(len(layer), found.first, found.second)
    assert found.p == pytest.approx(law.sf(found.both - 1), rel=1e-9)
    assert found == agreement(*of([layer]))
    if 0 < found.first < len(layer) and 0 < found.second < len(layer):
        counts = np.arange(len(layer) + 1)
        mean = law.pmf(counts) @ counts
        deviation = math.sqrt(law.pmf(counts) @ (counts - mean) ** 2)
        assert found.z == pytest.approx((found.both - mean) / deviation, abs=1e-9)
    else:
        assert (found.z, found.p) == (None, 1)


def test_several_layers_are_near_the_exact_distribution_of_the_sum() -> None:
    torch.manual_seed(0)
    sizes, densities = (300, 200, 40), (0.2, 0.4, 0.5)
    first, second = (
        Masks({f"layer{i}": torch.rand(n) < d for i, (n, d) in enumerate(zip(sizes, densities))}) for _ in range(2)
    )
    found, exact = agreement(first, second), np.ones(1)
    for n, each in zip(sizes, layer_agreements(first, second).values()):
        exact = np.convolve(exact, stats.hypergeom(n, each.first, each.second).pmf(np.arange(n + 1)))
    mean = exact @ np.arange(len(exact))
    deviation = math.sqrt(exact @ (np.arange(len(exact)) - mean) ** 2)
    assert found.z == pytest.approx((found.both - mean) / deviation, rel=1e-6)
    assert found.p == pytest.approx(exact[found.both :].sum(), abs=0.005)


def test_tickets_that_share_far_more_than_chance_in_a_large_layer() -> None:
    torch.manual_seed(0)
    first = torch.rand(1000, 300) < 0.1
    second = (first & (torch.rand(1000, 300) < 0.2)) | (torch.rand(1000, 300) < 0.08)
    found = agreement(Masks({"w": first}), Masks({"w": second}))
    assert found.z is not None
    assert found.z > 30
    assert found.p < 1e-200
    apart = agreement(Masks({"w": first}), Masks({"w": ~first}))
    assert (apart.both, apart.jaccard, apart.p) == (0, 0, 1)


def test_nested_masks_have_a_coefficient_of_one() -> None:
    outer, inner = Masks({"w": torch.tensor([True, True, False])}), Masks({"w": torch.tensor([True, False, False])})
    found = agreement(outer, inner)
    assert (found.coefficient, found.jaccard) == (1, 0.5)


def test_masks_of_other_parameters_are_refused() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="for different parameters"):
        agreement(Masks({"a": mask}), Masks({"b": mask}))
    with pytest.raises(ValueError, match="has shape"):
        layer_agreements(Masks({"a": mask}), Masks({"a": mask[:2]}))
