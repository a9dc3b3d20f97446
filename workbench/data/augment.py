"""Random crops and flips that replay: functions of seed, view and index, a whole batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Augment:
    """What is done to a training image: padded with zeros, cropped back to its size anywhere, perhaps mirrored.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2 (padding 4, mirrored half the time).

    Attributes:
        padding: Pixels on each side, 0 for no crop.
        flip: Whether an image is mirrored left to right with probability 1/2.

    Raises:
        ValueError: A negative padding.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding={self.padding}: give a number of pixels, 0 for no crop.")

    def __bool__(self) -> bool:
        return self.padding > 0 or self.flip


def random_bits(indices: Sequence[int], views: int, seed: int, count: int) -> np.ndarray:
    """64 random bits for each of ``count`` decisions about each sample, uint64 [count, B].

    A hash of (seed, view, index, decision), independent of all other draws. The view is ``epoch % views`` of a
    `workbench.training.EpochIndex`, or the epoch where views is 0. For indices without an epoch the bits come from
    torch's global generator.

    Source: splitmix64, Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".

    Args:
        indices: Of the samples, [B].
        views: Number of different views of a sample, 0 for any number.
        seed: Any integer.
        count: Decisions a sample.
    """
    epochs = [getattr(index, "epoch", None) for index in indices]
    numbers = [epoch for epoch in epochs if epoch is not None]
    if len(numbers) < len(epochs):
        drawn = torch.randint(-(2**63), 2**63 - 1, (count, len(epochs)))
        return drawn.numpy().view(np.uint64)
    view = np.array([epoch % views if views else epoch for epoch in numbers], dtype=np.uint64)
    state = _mix(_mix(_mix(np.full(len(epochs), seed & _MASK, np.uint64)) + view) + np.array(indices, np.uint64))
    steps = np.array([(_STEP * (n + 1)) & _MASK for n in range(count)], np.uint64)
    return _mix(state + steps[:, None])


def _mix(z: np.ndarray) -> np.ndarray:
    """Splitmix64's bijection of 64 bits that looks like a random one; arithmetic is modulo 2^64."""
    z = z + np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def augmented(images: Tensor, augment: Augment, bits: np.ndarray) -> Tensor:
    """The images shifted and mirrored by ``bits``, uint64 [3, B], for rows, columns and mirroring.

    Args:
        images: Of any dtype, [B, C, H, W]; not changed.
        augment: What is done.
        bits: As `random_bits` gives them, count 3.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[-2:]
    if augment.padding:
        places = 2 * augment.padding + 1
        padded = F.pad(images, (augment.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows, columns = (torch.from_numpy(_below(places, row)) for row in bits[:2])
        images = windows[torch.arange(len(images)), :, rows, columns]
    if augment.flip:
        mirrored = torch.from_numpy(bits[2] >> np.uint64(63) == 1)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def _below(n: int, bits: np.ndarray) -> np.ndarray:
    """Evenly distributed integers 0 .. n-1, int64, n < 2^32."""
    return ((bits >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
