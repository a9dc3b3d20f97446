"""Running text for language modelling, in blocks of tokens."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from workbench.data.prepared import Prepared
from workbench.data.splits import WHOLE, check_fractions
from workbench.data.text.batches import Item, TextModule, Tokenization
from workbench.data.text.reading import read_rows, read_text
from workbench.data.text.tokens import Tokens, load
from workbench.paths import resolve_path
from workbench.tasks import LanguageModelling

UNKNOWN, END = "<unk>", "<eos>"
_IGNORED = -100
_PIECE = 1 << 16  # characters given to a tokenizer at a time, at least


@final
class TokenBlocks(Dataset[Item]):
    """A stream of tokens in blocks of one length: ``{"input_ids": int64 [L], "labels": int64 [L]}``.

    A block begins with the last token of the one before, so that every token but the stream's first is predicted
    exactly once; the last block is moved back to end with the stream, and what that repeats has the label -100.

    Args:
        stream: Token numbers, int [N].
        length: L, from 2 to N.

    Raises:
        ValueError: If the stream is shorter than a block.
    """

    views = 1

    def __init__(self, stream: Tensor, length: int) -> None:
        if len(stream) < length:
            raise ValueError(f"a part has {len(stream)} tokens, fewer than length={length}: set a smaller length.")
        self.stream, self.length = stream, length
        self.count = -(-(len(stream) - 1) // (length - 1))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(f"there is no block {index} among {self.count}")
        start = index * (self.length - 1)
        back = max(0, start + self.length - len(self.stream))
        ids = self.stream[start - back : start - back + self.length].long()
        labels = ids.clone()
        labels[: back + 1 if back else 0] = _IGNORED
        return {"input_ids": ids, "labels": labels}


@final
class TextStream(TextModule):
    """Running text for a causal language model: characters, words, or a tokenizer's tokens, in blocks of one length.

    Batches: ``input_ids`` and ``labels`` int64 [B, length], labels unshifted, -100 where a token was predicted before;
    see `TokenBlocks` and `workbench.tasks.LanguageModelling`. Characters and words are numbered from the training part
    alone: ``<unk>`` is 0, words also have ``<eos>``, 1, at the end of every line; characters follow in their own order,
    words by falling frequency.

    Args:
        train: The text: a file or several, in which ``~`` and environment variables (``$DATA/wikitext/train.txt``) are
            replaced, or, with ``column``, anything that `workbench.data.text.reading.read_rows` reads.
        val: Text for validation; if None, ``validation`` of the end of the training text.
        test: Text for the test; if None, ``testing`` of the end of the training text, after that for validation.
        tokens: "char", "word", or the folder or hub name of a tokenizer.
        length: Tokens in a block.
        vocabulary: Most tokens for "char" and "word", special ones included; no limit if None.
        min_count: How often a character or word must occur to be numbered.
        batch_size: Blocks in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        validation: Fraction of the training text.
        testing: Fraction of the training text.
        column: Column of texts, for tables and data sets of the hub; their rows are joined line by line. A data set's
            own splits count where ``val`` and ``test`` are None.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken file, or a part shorter than a block.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        tokens: str = "char",
        length: int = 128,
        vocabulary: int | None = None,
        min_count: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: float = 0.05,
        testing: float = 0.05,
        column: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_fractions(validation=validation, testing=testing)
        if length < 2 or min_count < 1 or (vocabulary is not None and vocabulary < 3):
            raise ValueError(
                f"length={length}, min_count={min_count}, vocabulary={vocabulary}: give at least 2, 1 and 3."
            )
        self.sources = {"train": train, "val": val, "test": test}
        self.tokens, self.length, self.size, self.min_count = tokens, length, vocabulary, min_count
        self.cuts = {"val": validation, "test": testing}
        self.column = column

    @property
    def task(self) -> LanguageModelling:
        """What a recipe trains for unless it names a task: the next token; the text is read for their number."""
        return LanguageModelling(len(self.vocabulary))

    def read(self) -> Prepared[Tokenization]:
        """Read, split, number what occurs in the training part, and cut into blocks."""
        texts = self._texts()
        symbols = {name: _words(text) if self.tokens == "word" else text for name, text in texts.items()}
        symbols = _split(symbols, self.cuts)
        if self.tokens in ("char", "word"):
            special = [UNKNOWN, END] if self.tokens == "word" else [UNKNOWN]
            tokenizer = _SymbolTokenizer(_vocabulary(symbols["train"], special, self.size, self.min_count))
        else:
            tokenizer = _LoadedTokenizer(load(resolve_path(self.tokens), sys.maxsize))
        parts: dict[str, Dataset[Item]] = {}
        for name, part in symbols.items():
            try:
                parts[name] = TokenBlocks(tokenizer.encode(part), self.length)
            except ValueError as error:
                raise ValueError(f"{self.sources[name] or self.sources['train']}, {name}: {error}") from error
        return Prepared(parts, default_collate, Tokenization(tokenizer.vocabulary, tokenizer.fingerprint))

    def _texts(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        for name, source in self.sources.items():
            if source is not None:
                texts |= self._read(name, [source] if isinstance(source, str | os.PathLike) else source)
        return texts

    def _read(self, name: str, sources: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
        if self.column is None:
            return {name: "".join(read_text(Path(resolve_path(source))) for source in sources)}
        read = [read_rows(source, [self.column]) for source in sources]
        # A source for training may have splits of its own for the others; one of those has it whole, or by its name.
        wanted = [name] if name != "train" else [name, *(n for n in ("val", "test") if self.sources[n] is None)]
        texts: dict[str, str] = {}
        for part in wanted:
            rows = [row for each in read for row in each.get(part, each.get(WHOLE, []) if part == name else [])]
            if invalid := [text for (text,) in rows if not isinstance(text, str)]:
                raise ValueError(f"{sources}: column {self.column!r} has {repr(invalid[0])[:40]}, which is not a text.")
            if rows:
                texts[part] = "\n".join(text for (text,) in rows)
        if name not in texts:
            raise ValueError(
                f"{sources}: has no split {name!r}, only {', '.join(key for each in read for key in each)}."
            )
        return texts


@final
class _SymbolTokenizer:
    """A tokenizer of characters or words."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary
        self.fingerprint = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def encode(self, symbols: Sequence[str]) -> Tensor:
        get = self.vocabulary.get
        return torch.tensor([get(symbol, 0) for symbol in symbols], dtype=torch.int32)


@final
class _LoadedTokenizer:
    """A tokenizer loaded from a folder or the hub, without its special tokens."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.vocabulary, self.fingerprint = tokens.vocabulary, tokens.fingerprint

    def encode(self, text: Sequence[str]) -> Tensor:
        assert isinstance(text, str)
        lines = text.splitlines(keepends=True)
        # In pieces of whole lines: a tokenizer keeps much about every token until it is done with a text.
        sizes = accumulate(len(line) for line in lines)
        pieces = (
            "".join(line for _, line in group) for _, group in groupby(zip(sizes, lines), lambda p: p[0] // _PIECE)
        )
        numbers = [torch.tensor(each, dtype=torch.int32) for each in self.tokens.encode(pieces, special=False)]
        return torch.cat(numbers)


def _words(text: str) -> list[str]:
    """Words between blanks, and the end of every line."""
    return list(chain.from_iterable([*line.split(), END] for line in text.removesuffix("\n").split("\n")))


def _split(parts: Mapping[str, Sequence[str]], cuts: Mapping[str, float]) -> dict[str, Sequence[str]]:
    """Train, val and test: those missing are the end of the training part."""
    whole = parts["train"]
    sizes = {name: round(fraction * len(whole)) for name, fraction in cuts.items() if name not in parts}
    end = len(whole) - sum(sizes.values())
    split: dict[str, Sequence[str]] = {**parts, "train": whole[:end]}
    for name, size in sizes.items():
        split[name] = whole[end : end + size]
        end += size
    return {name: split[name] for name in ("train", "val", "test")}


def _vocabulary(symbols: Sequence[str], special: Sequence[str], size: int | None, min_count: int) -> dict[str, int]:
    """The special symbols, then those frequent enough: characters in order, words by falling frequency."""
    counts = Counter(symbols)
    for symbol in special:
        counts.pop(symbol, None)
    frequent = sorted((-count, symbol) for symbol, count in counts.items() if count >= min_count)
    kept = [symbol for _, symbol in frequent[: None if size is None else size - len(special)]]
    kept = sorted(kept) if END not in special else kept
    return {symbol: number for number, symbol in enumerate([*special, *kept])}
