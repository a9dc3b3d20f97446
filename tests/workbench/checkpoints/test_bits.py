import math

import pytest
import torch

from workbench.checkpoints import compact


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (2, 3, 4, 5)])
def test_bits_are_packed_and_unpacked(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = compact.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(mask.numel() / 8),)
    naive = [sum(bit << (7 - i) for i, bit in enumerate(bits)) for bits in _bytes(mask.flatten().int().tolist())]
    assert packed.tolist() == naive
    assert torch.equal(compact.unpack(packed, shape), mask)


def _bytes(bits: list[int]) -> list[list[int]]:
    return [bits[i : i + 8] for i in range(0, len(bits), 8)]
