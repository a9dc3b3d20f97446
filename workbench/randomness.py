"""The random state of a process: python, numpy, torch and its CUDA devices. Torch only; numpy where it is there."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def random_state() -> dict[str, Any]:
    """State of the generators of python, numpy (if it is imported) and torch, as tensors and plain values."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state(legacy=True)
        state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the generators from a :func:`random_state`, as far as this machine has them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


@contextmanager
def same_random_state(seed: int | None = None) -> Iterator[None]:
    """Inside, python, numpy and torch draw as they please, from ``seed`` if given; afterwards all is as it was."""
    state = random_state()
    try:
        if seed is not None:
            random.seed(seed)
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(seed)
            torch.manual_seed(seed)
        yield
    finally:
        set_random_state(state)


def isolated(items: Iterable[T], count: int, seed: int | None = None) -> Iterator[T]:
    """The first ``count`` of ``items``, drawn from a random state of their own, which starts from ``seed`` if given.

    Between two items, and afterwards, the random state of the process is as it was.
    """
    iterator: Iterator[T] | None = None
    state: dict[str, Any] | None = None
    for _ in range(count):
        with same_random_state(seed if state is None else None):
            if state is not None:
                set_random_state(state)
            if iterator is None:  # a DataLoader draws a seed for its workers here
                iterator = iter(items)
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = random_state()
        yield item
