"""Batches with cached targets in a Trainer of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from distill.cache import CachedBatch
from distill.cache.samples import fetch

CACHED_TARGETS = "cached_targets"
"""The entry of a batch that has its cached targets."""


@dataclass(frozen=True)
class AddCachedTargets:
    """Collates a cached teacher's batch into a mapping, which is all that a Trainer can handle.

    Args:
        collate: Of the loader that ``attach`` returned.
    """

    collate: Callable[[Any], CachedBatch]

    def __call__(self, samples: Any) -> dict[str, Any]:
        """The batch with its cached targets as one more entry."""
        batch, targets = self.collate(samples)
        return {**batch, CACHED_TARGETS: targets}


def first_samples(dataset: Any, count: int) -> Any:
    """The first samples of a data set, as a loader fetches them."""
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, count))
    return fetch(dataset, range(min(count, len(dataset))))
