"""Sequences one by one, such as a teacher generated."""

import os
from collections.abc import Sequence
from typing import Any, final

from workbench.data.prepared import Prepared
from workbench.data.splits import Rows, check_fractions, split_rows
from workbench.data.text.batches import Padding, TextModule, Tokenization, TokenLists
from workbench.data.text.reading import read_rows
from workbench.data.text.tokens import Tokens, load
from workbench.paths import resolve_path


@final
class TextSequences(TextModule):
    """Sequences for a causal language model, each by itself: texts, or lists of generated token numbers.

    For distillation on the sequence level: a column that the teacher wrote, in a table or a data set, is what the
    student is trained on (Kim & Rush 2016, arXiv:1606.07947). Nothing is generated here. Parts that a source lacks are
    cut from its training part, the same in every run.

    Batches: ``input_ids`` and ``attention_mask`` int64 [B, L], padded on the right to the longest of the batch; and
    ``prompt_lengths`` int64 [B] if there is such a column: so many tokens at the beginning are no targets.

    Args:
        path: A file or folder, in which ``~`` and environment variables are replaced, or the name of a data set of the
            hub; see `workbench.data.text.reading.read_rows`.
        column: Column of texts or of lists of token numbers.
        prompt: Column of numbers of prompt tokens, if any.
        tokenizer: Folder or hub name of a tokenizer; needed for texts. With token numbers, it says what they mean and
            which of them pads.
        length: Tokens that a sequence is cut to.
        batch_size: Sequences in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        validation: Fraction of the training part that becomes the validation part, where there is none.
        test: The same for the test part.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken source, texts without a tokenizer, or
            numbers that are none of its tokens.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        column: str = "text",
        prompt: str | None = None,
        tokenizer: str | None = None,
        length: int = 512,
        batch_size: int = 16,
        num_workers: int = 0,
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_fractions(validation=validation, test=test)
        if length < 2:
            raise ValueError(f"length={length}: give at least 2 tokens.")
        self.path, self.column, self.prompt, self.length = path, column, prompt, length
        self.loaded_from = tokenizer
        self.validation, self.test = validation, test

    def read(self) -> Prepared[Tokenization]:
        """Read, split and, if need be, tokenize."""
        splits = read_rows(self.path, [self.column, *([self.prompt] if self.prompt else [])])
        strata = {name: [0] * len(rows) for name, rows in splits.items()}
        parts = split_rows(splits, self.validation, self.test, strata, self.path)
        tokens = load(resolve_path(self.loaded_from), self.length) if self.loaded_from else None
        data = {name: self._lists(rows, tokens, f"{self.path}, {name}") for name, rows in parts.items()}
        if tokens is None:
            return Prepared(data, Padding(0), Tokenization({}, "numbers as they are"))
        return Prepared(data, Padding(tokens.pad), Tokenization(tokens.vocabulary, tokens.fingerprint))

    def _lists(self, rows: Rows, tokens: Tokens | None, where: str) -> TokenLists:
        column: list[Any] = [row[0] for row in rows]
        if all(isinstance(each, str) for each in column):
            if tokens is None:
                raise ValueError(f"{where}: column {self.column!r} has texts; give a tokenizer.")
            sequences = tokens.encode(column)
        else:
            sequences = [self._numbers(each, tokens, f"{where}, row {i}") for i, each in enumerate(column, 1)]
        if not self.prompt:
            return TokenLists(sequences)
        prompts = [row[1] for row in rows]
        if invalid := [each for each in prompts if not isinstance(each, int) or each < 0]:
            raise ValueError(f"{where}: column {self.prompt!r} has {invalid[0]!r}, which is no number of tokens.")
        return TokenLists(sequences, {"prompt_lengths": prompts})

    def _numbers(self, numbers: Any, tokens: Tokens | None, where: str) -> Sequence[int]:
        size = len(tokens.vocabulary) if tokens else None
        if (
            not isinstance(numbers, Sequence)
            or isinstance(numbers, str)
            or not all(isinstance(n, int) for n in numbers)
        ):
            raise ValueError(f"{where}: {repr(numbers)[:40]} is not a list of token numbers like the rest.")
        if invalid := [n for n in numbers if n < 0 or (size is not None and n >= size)]:
            raise ValueError(f"{where}: {invalid[0]} is none of the {size or 'possible'} token numbers.")
        return numbers[: self.length]
