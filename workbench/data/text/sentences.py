"""Texts without labels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import final

from workbench.data.prepared import Prepared
from workbench.data.splits import WHOLE, Rows, check_fractions, split_rows
from workbench.data.text.batches import Padding, TextModule, Tokenization, TokenLists
from workbench.data.text.reading import read_labelled, read_lines, read_rows
from workbench.data.text.tokens import tokens_for
from workbench.paths import resolve_path


@final
class Sentences(TextModule):
    """Sentences without labels, from several files or data sets: what a student learns its teacher's embeddings on.

    Batches: ``input_ids`` and ``attention_mask`` int64 [B, L], padded on the right to the longest of the batch. The
    split is the same in every run, and each file is shared out over the parts in proportion.

    Args:
        paths: Text files of a sentence a line, in which ``~`` and environment variables (``$DATA/mr/rt-polarity.all``)
            are replaced, or, with ``column``, what `workbench.data.text.reading.read_rows` reads, the hub's data
            sets too.
        tokenizer: "word" or "bpe", learnt from the training part, or the folder (``package:NAME/folder`` too) or hub
            name of a tokenizer, such as that of a pretrained encoder.
        labelled: Whether a line is ``label text``, of which the label is dropped.
        vocabulary: Most tokens of a learnt tokenizer.
        length: Tokens that a sentence is cut to, special ones included.
        batch_size: Sentences in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        validation: Fraction that becomes the validation part.
        test: Fraction that becomes the test part.
        column: Column of sentences, for tables and data sets of the hub; of those in parts the training part is read.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: str = "word",
        labelled: bool = True,
        vocabulary: int = 8000,
        length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: float = 0.05,
        test: float = 0.05,
        column: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_fractions(validation=validation, test=test)
        if isinstance(paths, str | os.PathLike) or not paths:
            raise ValueError(f"paths={paths!r}: give a list of one or more text files.")
        self.paths, self.labelled, self.column = list(paths), labelled, column
        self.tokens = tokens_for(tokenizer, vocabulary, length)
        self.validation, self.test = validation, test

    def read(self) -> Prepared[Tokenization]:
        """Read, split, learn the tokenizer from the training part if so chosen, and tokenize."""
        rows: Rows = []
        files: list[int] = []
        for number, name in enumerate(self.paths):
            read = self._read(name)
            rows += read
            files += [number] * len(read)
        parts = split_rows({WHOLE: rows}, self.validation, self.test, {WHOLE: files}, ", ".join(map(str, self.paths)))
        tokens = self.tokens([text for text, _ in parts["train"]])
        data = {name: TokenLists(tokens.encode(text for text, _ in part)) for name, part in parts.items()}
        return Prepared(data, Padding(tokens.pad), Tokenization(tokens.vocabulary, tokens.fingerprint))

    def _read(self, name: str) -> Rows:
        """(sentence, label) of every row."""
        if self.column is None:
            path = Path(resolve_path(name))
            return read_labelled(path) if self.labelled else [(line, None) for _, line in read_lines(path)]
        splits = read_rows(name, [self.column])
        rows = splits.get("train", splits.get(WHOLE))
        if rows is None:
            raise ValueError(f"{name}: has no split 'train', only {', '.join(map(repr, splits))}.")
        if invalid := [text for (text,) in rows if not isinstance(text, str)]:
            raise ValueError(f"{name}: column {self.column!r} has {repr(invalid[0])[:40]}, which is not a text.")
        return [(text, None) for (text,) in rows]
