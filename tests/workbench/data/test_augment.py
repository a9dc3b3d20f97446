import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.data import Augment
from workbench.data.augment import augmented, random_bits
from workbench.training.order import EpochIndex


def splitmix64(state):
    """Vigna's splitmix64.c: the next number, and the state after it."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31), state


@given(st.integers(-(2**70), 2**70), st.integers(0, 9), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 500))))
@settings(deadline=None, max_examples=50)
def test_random_bits_are_a_function_of_seed_view_and_index(seed, views, samples):
    bits = random_bits([EpochIndex(index, epoch) for index, epoch in samples], views, seed, 3)
    assert bits.shape == (3, len(samples))
    for column, (index, epoch) in enumerate(samples):
        view = epoch % views if views else epoch
        key = splitmix64(seed % 2**64)[0]
        key = splitmix64((key + view) % 2**64)[0]
        state = splitmix64((key + index) % 2**64)[0]
        for row in range(3):
            expected, _ = splitmix64((state + 0x9E3779B97F4A7C15 * (row + 1)) % 2**64)
            assert int(bits[row, column]) == expected


def test_splitmix64_is_the_published_one():
    """The first numbers of seed 1234567, from Rosetta Code."""
    state, found = 1234567, []
    for _ in range(3):
        number, state = splitmix64(state)
        found.append(number)
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_bits_are_evenly_distributed():
    """Over indices, views and seeds alike; 9 places and a coin, chi squared below its 1 - 1e-6 quantile."""
    many = 9000
    for bits in (
        random_bits([EpochIndex(i, 0) for i in range(many)], 0, 0, 3),
        random_bits([EpochIndex(5, epoch) for epoch in range(many)], 0, 0, 3),
        np.concatenate([random_bits([EpochIndex(5, 0)], 0, seed, 3) for seed in range(many)], 1),
    ):
        places = np.bincount((bits[0] >> np.uint64(32)) * np.uint64(9) >> np.uint64(32), minlength=9)
        assert ((places - many / 9) ** 2 / (many / 9)).sum() < 42.7
        assert abs((bits[2] >> np.uint64(63)).sum() - many / 2) < 5 * (many / 4) ** 0.5
        ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 64).mean(0)
        assert np.abs(ones - 0.5).max() < 5 * (1 / 4 / (3 * many)) ** 0.5


def crop(image, padding, row, column, mirrored):
    """One image, by the book."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y, x = i + row - padding, (width - 1 - j if mirrored else j) + column - padding
                if 0 <= y < height and 0 <= x < width:
                    out[c, i, j] = image[c, y, x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("augment", [Augment(), Augment(2, False), Augment(0, True), Augment(7)])
def test_augmented_by_the_book(augment, dtype):
    images = torch.randint(1, 256, (12, 2, 5, 6)).to(dtype)
    before = images.clone()
    bits = random_bits([EpochIndex(i, 3) for i in range(12)], 0, 1, 3)
    found = augmented(images, augment, bits)
    assert torch.equal(images, before)
    assert (found.dtype, found.shape) == (dtype, images.shape)
    for n, image in enumerate(images):
        row, column = (int(bits[k, n]) // 2**32 * (2 * augment.padding + 1) // 2**32 for k in (0, 1))
        mirrored = augment.flip and int(bits[2, n]) >= 2**63
        assert torch.equal(found[n], crop(image, augment.padding, row, column, mirrored))


def test_augmentation_reaches_every_place():
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 1] = 1
    found = augmented(
        image.expand(500, -1, -1, -1), Augment(1), random_bits([EpochIndex(i, 0) for i in range(500)], 0, 0, 3)
    )
    assert found.flatten(1).sum(1).tolist() == [1] * 500, "the middle is never lost"
    assert (found.sum(0) > 30).all(), "and seen everywhere"
