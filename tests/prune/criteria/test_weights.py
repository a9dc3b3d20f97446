import torch

from prune.criteria import magnitude, random, seeded


def test_magnitude_is_the_absolute_value():
    assert magnitude(torch.tensor([[-2.0, 0.5], [-0.0, 3.0]])).tolist() == [[2.0, 0.5], [0.0, 3.0]]


def test_random_depends_on_seed_and_name_and_nothing_else():
    weight = torch.zeros(50)
    first = random(weight, seeded(1, "a.weight"))
    torch.rand(7)  # the global generator plays no part
    random(weight, seeded(1, "b.weight"))  # nor do other parameters
    assert torch.equal(first, random(weight + 5, seeded(1, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(2, "a.weight")))
    assert not torch.equal(first, random(weight, seeded(1, "b.weight")))
    assert bool(((first >= 0) & (first < 1)).all())
