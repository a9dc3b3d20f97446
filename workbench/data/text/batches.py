"""Token sequences in memory, padding, and the base of text data modules."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from workbench.data.prepared import InMemoryDataModule

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


class Tokenization(NamedTuple):
    """How a text data module numbers tokens.

    Args:
        vocabulary: Token -> number; empty if token numbers were given.
        fingerprint: SHA-256 of everything that decides which numbers a text becomes.
    """

    vocabulary: dict[str, int]
    fingerprint: str


class TextModule(InMemoryDataModule[Tokenization]):
    """A data module over text in memory; subclasses read it. Arguments as of its base."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> number; read now if that was not done yet."""
        return self._ready.info.vocabulary

    @property
    def tokenizer(self) -> str:
        """SHA-256 of what decides which numbers a text becomes; part of a teacher's cache's fingerprint."""
        return self._ready.info.fingerprint
