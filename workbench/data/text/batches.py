"""What text data modules share: token sequences in memory, padding and splits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from workbench.data.images import SPLIT_SEED, stratified_split
from workbench.data.prepared import InMemoryDataModule
from workbench.data.text.reading import WHOLE, Rows

Item = dict[str, Tensor]


@final
class TokenLists(Dataset[Item]):
    """Sequences of token numbers, and numbers that belong to each.

    An item is ``{"input_ids": int64 [L], **{name: number}}``; its index is its stable name.

    Args:
        sequences: Token numbers.
        extras: Name -> one integer a sequence, such as ``labels``.

    Raises:
        ValueError: If a sequence is empty.
    """

    views = 1

    def __init__(self, sequences: Sequence[Sequence[int]], extras: Mapping[str, Sequence[int]] | None = None) -> None:
        lengths = np.array([len(each) for each in sequences], dtype=np.int64)
        if (empty := np.flatnonzero(lengths == 0)).size:
            raise ValueError(f"sequence {empty[0]} has no tokens: leave empty texts out.")
        self.ends = np.cumsum(lengths)
        self.tokens = torch.from_numpy(np.concatenate([np.asarray(each, dtype=np.int32) for each in sequences]))
        self.extras = {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in (extras or {}).items()}

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"there is no sequence {index} among {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        ids = self.tokens[start : int(self.ends[index])].long()
        return {"input_ids": ids, **{name: numbers[index] for name, numbers in self.extras.items()}}


@final
class Padding:
    """Makes a batch of items of unequal length: ``input_ids`` filled up on the right to the longest, and a mask of it.

    Args:
        pad: Token number to fill up with.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` int64 [B, L], and everything else stacked."""
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(each) for each in ids], batch_first=True
            ),
        }
        return batch | {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "input_ids"}


class Prepared(NamedTuple):
    """What a text data module made of its files."""

    parts: dict[str, Dataset[Item]]
    collate: Any
    vocabulary: dict[str, int]
    fingerprint: str


class TextModule(InMemoryDataModule[Prepared]):
    """A data module over text in memory; subclasses say how to read it. Arguments as of its base."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> number; read now if that was not done yet."""
        return self._ready.vocabulary

    @property
    def tokenizer(self) -> str:
        """SHA-256 of what decides which numbers a text becomes; part of a teacher's cache's fingerprint."""
        return self._ready.fingerprint


def check_fractions(**fractions: float) -> None:
    """Raise ValueError unless each is between 0 and 1, and together they leave something for training."""
    if not all(0 < each < 1 for each in fractions.values()) or sum(fractions.values()) >= 1:
        said = ", ".join(f"{name}={value}" for name, value in fractions.items())
        raise ValueError(f"{said}: give fractions above 0 that leave something for training.")


def split_rows(
    found: Mapping[str, Rows], validation: float, test: float, strata: Mapping[str, Sequence[int]], where: object
) -> dict[str, Rows]:
    """Rows as train, val and test: those that are there, the others cut from what is for training.

    Args:
        found: Split -> rows, as read; any that are none of the three are left out.
        validation: Fraction to cut for validation, if there is no ``val``.
        test: Fraction to cut for the test, if there is no ``test``.
        strata: Split -> class of each of its rows; each class is shared out in proportion.
        where: Named in errors.

    Raises:
        ValueError: If there is nothing to train on, or not enough to cut from.
    """
    source = "train" if "train" in found else WHOLE
    if source not in found:
        raise ValueError(f"{where}: has no split 'train', only {', '.join(map(repr, found))}.")
    rows = found[source]
    cut = {name: part for name, part in (("val", validation), ("test", test)) if name not in found}
    sizes = [max(1, round(part * len(rows))) for part in cut.values()]
    try:
        pieces = stratified_split(strata[source], sizes, SPLIT_SEED)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    made = {name: [rows[i] for i in piece] for name, piece in zip(("train", *cut), pieces)}
    return {name: made[name] if name in made else found[name] for name in ("train", "val", "test")}
