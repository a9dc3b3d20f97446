"""Labelled texts."""

import os
from typing import final

from workbench.data.prepared import Prepared
from workbench.data.splits import Rows, check_fractions, split_classes
from workbench.data.text.batches import Padding, TextModule, Tokenization, TokenLists
from workbench.data.text.reading import read_rows
from workbench.data.text.tokens import tokens_for


@final
class TextClassification(TextModule):
    """Texts of one class each, from a file, a folder or the hub; see `workbench.data.text.reading.read_rows`.

    Among them CLINC150's JSON, ``label text`` lines, tables and `datasets`. Parts that a source lacks are cut from its
    training part, stratified and the same in every run.

    Batches: ``input_ids`` and ``attention_mask`` int64 [B, L], padded on the right to the longest of the batch;
    ``labels`` int64 [B]. Classes are numbered in the order of their names, or of their numbers.

    Args:
        path: A file or folder, in which ``~`` and environment variables (``$DATA/clinc150/data_full.json``) are
            replaced, or the name of a data set of the hub.
        text: Name of the column of texts.
        label: Name of the column of labels.
        tokenizer: "word" or "bpe", learnt from the training texts, or the folder or hub name of a tokenizer.
        vocabulary: Most tokens of a learnt tokenizer.
        length: Tokens that a text is cut to, special ones included.
        batch_size: Samples in a batch.
        num_workers: Loader processes; 0 loads in this one, which is fast, as all is in memory.
        validation: Fraction of the training part that becomes the validation part, where there is none.
        test: The same for the test part.
        out_of_scope: Whether the parts ``oos_train``, ``oos_val`` and ``oos_test`` of CLINC150 are used, as a class
            more.

    Raises:
        ValueError: An argument out of range; on `setup`, a missing or broken source, a label that training never saw,
            or fewer than two classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str = "text",
        label: str = "label",
        tokenizer: str = "word",
        vocabulary: int = 8000,
        length: int = 128,
        batch_size: int = 64,
        num_workers: int = 0,
        validation: float = 0.1,
        test: float = 0.1,
        out_of_scope: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_fractions(validation=validation, test=test)
        self.path, self.text, self.label = path, text, label
        self.tokens = tokens_for(tokenizer, vocabulary, length)
        self.validation, self.test, self.out_of_scope = validation, test, out_of_scope

    @property
    def names(self) -> list[str]:
        """The classes' names by number; read now if necessary."""
        return list(self._ready.names)

    @property
    def classes(self) -> int:
        """Number of classes; read now if necessary."""
        return len(self.names)

    def read(self) -> Prepared[Tokenization]:
        """Read, split, learn the tokenizer from the training part if so chosen, and tokenize."""
        rows = _labelled(read_rows(self.path, (self.text, self.label)), self.path, self.out_of_scope)
        parts, names = split_classes(rows, self.validation, self.test, self.path)
        tokens = self.tokens([text for text, _ in parts["train"]])
        data = {
            name: TokenLists(tokens.encode(text for text, _ in rows), {"labels": [number for _, number in rows]})
            for name, rows in parts.items()
        }
        return Prepared(data, Padding(tokens.pad), Tokenization(tokens.vocabulary, tokens.fingerprint), names)


def _labelled(splits: dict[str, Rows], where: object, out_of_scope: bool) -> dict[str, Rows]:
    """Texts as they are and labels as names, in the splits that are wanted."""
    labelled: dict[str, Rows] = {}
    for name, rows in splits.items():
        for number, (text, label) in enumerate(rows, 1):
            if not isinstance(text, str) or not isinstance(label, str | int):
                raise ValueError(
                    f"{where}, {name!r}, row {number}: text {repr(text)[:40]} and label {label!r} are not a text "
                    "and a name or number: name the columns text and label."
                )
        labelled[name] = [(text, str(label)) for text, label in rows]
    if out_of_scope:
        extra = {name: labelled.get(f"oos_{name}") for name in ("train", "val", "test")}
        if missing := [name for name, rows in extra.items() if rows is None]:
            raise ValueError(f"{where}: has no 'oos_{missing[0]}': set out_of_scope to false.")
        for name, rows in extra.items():
            labelled[name] = labelled.get(name, []) + (rows or [])
    return {name: rows for name, rows in labelled.items() if not name.startswith("oos_")}
