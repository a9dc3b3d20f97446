"""Bool tensors as bits, eight to a byte. Torch only."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def pack(mask: Tensor) -> Tensor:
    """One bit per entry, the first in the highest bit, zeros to a whole byte, as ``numpy.packbits`` does.

    Args:
        mask: bool, any shape, read in row-major order.

    Returns:
        uint8 [ceil(n / 8)] on the mask's device.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}: give torch.bool")
    bits = nn.functional.pad(mask.flatten().view(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8, device=mask.device)
    for column in range(8):
        packed |= bits[:, column] << (7 - column)
    return packed


def unpack(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool mask of ``shape`` that ``pack`` packed.

    Raises:
        ValueError: if ``packed`` is not uint8 of exactly the bytes ``shape`` needs, or a padding bit is set.
    """
    shape = list(shape)
    if packed.dtype != torch.uint8 or list(packed.shape) != [packed_bytes(shape)]:
        raise ValueError(
            f"shape {shape} needs {packed_bytes(shape)} bytes of torch.uint8, "
            f"but got {packed.dtype} {list(packed.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, None] >> shifts) & 1).bool().flatten()
    count = math.prod(shape)
    if bits[count:].any():
        raise ValueError(f"the padding after the {count} bits of shape {shape} is not zero")
    return bits[:count].reshape(shape)


def packed_bytes(shape: Iterable[int]) -> int:
    """Bytes that the bits of a tensor of this shape take."""
    return -(-math.prod(shape) // 8)
