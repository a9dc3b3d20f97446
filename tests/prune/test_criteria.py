import pytest
import torch

from prune.criteria import CRITERIA, magnitude, random, seeded


def test_magnitude_is_the_absolute_value():
    assert magnitude(torch.tensor([[-2.0, 0.5], [-0.0, 3.0]])).tolist() == [[2.0, 0.5], [0.0, 3.0]]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(
    ("stored", "scored"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_are_at_least_fp32_and_of_the_weights_shape(name: str, stored: torch.dtype, scored: torch.dtype):
    criterion = CRITERIA[name]
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=stored))
    extra = [seeded(0, "w")] if criterion.needs_generator else []
    scores = criterion.score(weight, *extra)
    assert (scores.dtype, scores.shape, scores.requires_grad) == (scored, weight.shape, False)
    assert not criterion.needs_loader


def test_registry_says_what_is_needed():
    assert {name: c.needs_generator for name, c in CRITERIA.items()} == {"magnitude": False, "random": True}


def test_random_depends_on_seed_and_name_and_nothing_else():
    weight = torch.zeros(50)
    first = random(weight, seeded(1, "a.weight"))
    torch.rand(7)  # the global generator plays no part
    random(weight, seeded(1, "b.weight"))  # nor do other parameters
    assert torch.equal(first, random(weight + 5, seeded(1, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(2, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(1, "b.weight")))
    assert bool(((first >= 0) & (first < 1)).all())
