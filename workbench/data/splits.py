"""Train, validation and test splits: stratified, and the same in every run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = list[tuple[Any, ...]]

WHOLE = "all"
"""Name of the rows of a source that is not split."""

SPLIT_SEED = 20_160_608
"""Seeds every train / validation / test split, independently of a run's seed, and a finite number of views."""


def stratified_split(labels: Sequence[int] | np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Split indices at random into the rest and parts of given sizes, each class shared out in proportion.

    In each part a class has its proportional number of members rounded down or up, by largest remainder, ties
    going to the lower class. Depends on nothing but the arguments: ``numpy.random.RandomState`` is frozen by
    numpy's policy.

    Args:
        labels: The class of each sample, [N].
        sizes: Size of each part.
        seed: Seed of the draw.

    Returns:
        1 + len(sizes) sorted, disjoint index arrays, together 0 .. N-1; the rest comes first.

    Raises:
        ValueError: A size below 1, or no sample left for the rest.
    """
    labels = np.asarray(labels)
    if any(size < 1 for size in sizes) or sum(sizes) >= len(labels):
        raise ValueError(
            f"cannot split {len(labels)} samples into parts of {list(sizes)} and a rest: give sizes of "
            f"at least 1 with a sum below {len(labels)}."
        )
    random = np.random.RandomState(seed)
    pools = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    parts = []
    for size in sizes:
        counts = np.array([len(pool) for pool in pools])
        take, remainder = np.divmod(counts * size, counts.sum())
        take[np.argsort(-remainder, kind="stable")[: size - take.sum()]] += 1
        parts.append(np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, take)])))
        pools = [pool[n:] for pool, n in zip(pools, take)]
    return [np.sort(np.concatenate(pools)), *parts]


def check_fractions(**fractions: float) -> None:
    """Raise ValueError unless each is between 0 and 1, and together they leave something for training."""
    if not all(0 < each < 1 for each in fractions.values()) or sum(fractions.values()) >= 1:
        values = ", ".join(f"{name}={value}" for name, value in fractions.items())
        raise ValueError(f"{values}: give fractions above 0 that leave something for training.")


def split_rows(
    rows: Mapping[str, Rows], validation: float, test: float, strata: Mapping[str, Sequence[int]], where: object
) -> dict[str, Rows]:
    """Rows as train, val and test; splits that are missing are cut from the training rows.

    Args:
        rows: Split -> rows, as read; other splits than the three are left out.
        validation: Fraction to cut for validation, if there is no ``val``.
        test: Fraction to cut for the test, if there is no ``test``.
        strata: Split -> class of each of its rows; each class is shared out in proportion.
        where: Named in errors.

    Raises:
        ValueError: If there is nothing to train on, or not enough to cut from.
    """
    source = "train" if "train" in rows else WHOLE
    if source not in rows:
        raise ValueError(f"{where}: has no split 'train', only {', '.join(map(repr, rows))}.")
    training = rows[source]
    cut = {name: part for name, part in (("val", validation), ("test", test)) if name not in rows}
    sizes = [max(1, round(part * len(training))) for part in cut.values()]
    try:
        pieces = stratified_split(strata[source], sizes, SPLIT_SEED)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    parts = {name: [training[i] for i in piece] for name, piece in zip(("train", *cut), pieces)}
    return {name: parts[name] if name in parts else rows[name] for name in ("train", "val", "test")}


def split_classes(
    rows: Mapping[str, Rows], validation: float, test: float, where: object, names: Sequence[str] = ()
) -> tuple[dict[str, Rows], list[str]]:
    """Rows (sample, class name) as train, val and test by :func:`split_rows`, stratified, now (sample, class number).

    Args:
        rows: Split -> rows, as read.
        validation: Fraction to cut for validation, if there is no ``val``.
        test: Fraction to cut for the test, if there is no ``test``.
        where: Named in errors.
        names: Class names in order; by default those of the training part, sorted, numbers by value.

    Returns:
        Split -> rows, and the class names by number.

    Raises:
        ValueError: If training has fewer than two classes, or another part has a class that training lacks.
    """
    strata_of = {name: n for n, name in enumerate(sorted({label for part in rows.values() for _, label in part}))}
    strata = {split: [strata_of[label] for _, label in part] for split, part in rows.items()}
    parts = split_rows(rows, validation, test, strata, where)
    labels = list(names) or _sorted_names({label for _, label in parts["train"]})
    if len(labels) < 2:
        raise ValueError(f"{where}: training has the one class {labels[0]!r}; give at least two.")
    for split, part in parts.items():
        if unknown := sorted({label for _, label in part} - set(labels)):
            raise ValueError(f"{where}: {split} has the class {unknown[0]!r}, which training never saw.")
    numbers = {name: number for number, name in enumerate(labels)}
    return {split: [(sample, numbers[label]) for sample, label in part] for split, part in parts.items()}, labels


def _sorted_names(labels: set[str]) -> list[str]:
    numeric = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numeric else 0, label))
