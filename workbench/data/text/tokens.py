"""Tokenizers: one from a folder or the hub, or a small one learnt from the training texts."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, final

from workbench.paths import resolve_path

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first tokens of a learnt vocabulary, by number."""

LEARNT = ("word", "bpe")


@final
class Tokens:
    """A tokenizer of the `tokenizers` library, and the number that pads.

    Args:
        model: The tokenizer.
        pad: Number of the padding token.
        length: Tokens that a text is cut to, special ones included.
    """

    def __init__(self, model: Any, pad: int, length: int) -> None:
        model.no_padding()
        model.enable_truncation(length)
        self.model, self.pad = model, pad

    def encode(self, texts: Iterable[str], special: bool = True) -> list[list[int]]:
        """Token numbers of every text, optionally with the tokenizer's special tokens."""
        return [each.ids for each in self.model.encode_batch(list(texts), add_special_tokens=special)]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> number, in order of the numbers."""
        return dict(sorted(self.model.get_vocab().items(), key=lambda item: item[1]))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which numbers a text becomes."""
        return hashlib.sha256(f"{self.pad} {self.model.to_str()}".encode()).hexdigest()


def learn(texts: Sequence[str], kind: str, vocabulary: int, length: int) -> Tokens:
    """A tokenizer learnt from texts, the same from the same texts: lower case, accents dropped, [CLS] text [SEP].

    ``word`` keeps the most frequent words and punctuation marks, ``bpe`` merges the most frequent pairs of pieces
    (Sennrich et al. 2016, arXiv:1508.07909). WordPiece is not offered: what its trainer in `tokenizers` learns
    depends on the order of a hash table, which is another one in every process.

    Args:
        texts: The training texts.
        kind: "word" or "bpe".
        vocabulary: Most tokens, the 5 special ones included.
        length: Tokens that a text is cut to.

    Raises:
        ValueError: An argument out of range.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    check_size(vocabulary)
    options: dict[str, Any] = {"vocab_size": vocabulary, "special_tokens": [*SPECIAL], "show_progress": False}
    if kind == "word":
        model, trainer = models.WordLevel(unk_token=SPECIAL[1]), trainers.WordLevelTrainer(**options)
    elif kind == "bpe":
        model, trainer = models.BPE(unk_token=SPECIAL[1]), trainers.BpeTrainer(**options)
    else:
        raise ValueError(f"{kind!r} cannot be learnt: use one of {', '.join(LEARNT)}, or give a tokenizer's folder.")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = SPECIAL[2:4]
    tokenizer.post_processor = processors.TemplateProcessing(f"{cls} $A {sep}", None, [(cls, 2), (sep, 3)])
    return Tokens(tokenizer, 0, length)


def load(name: str, length: int) -> Tokens:
    """The tokenizer in a folder or of the hub, as transformers loads it.

    Raises:
        ValueError: If there is none, or only one without a ``tokenizer.json`` or a way to make it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub's, the network's and the files' own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: no tokenizer can be loaded from there ({reason}): give the folder of one, or one of "
            f"{', '.join(LEARNT)} to learn it from the training texts."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name}: its {type(tokenizer).__name__} is not one of the tokenizers library: give a fast one."
        )
    # Without a padding token the end token pads: the attention mask alone decides which tokens count.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Tokens(tokenizer.backend_tokenizer, next(int(pad) for pad in pads if pad is not None), length)


def tokens_for(tokenizer: str, vocabulary: int, length: int) -> Callable[[Sequence[str]], Tokens]:
    """Training texts -> tokenizer: a function that learns one, or that loads one and looks at no text.

    Args:
        tokenizer: "word", "bpe", or a folder, in which ``~`` and environment variables are replaced, or a hub name.
        vocabulary: Most tokens, if learnt.
        length: Tokens that a text is cut to.

    Raises:
        ValueError: An argument out of range.
    """
    if length < 3:
        raise ValueError(f"length={length}: give at least 3 tokens, two of them special.")
    if tokenizer not in LEARNT:
        return lambda _: load(resolve_path(tokenizer), length)
    check_size(vocabulary)
    return lambda texts: learn(texts, tokenizer, vocabulary, length)


def check_size(vocabulary: int) -> None:
    """Raises: ValueError: unless there is room for more than the special tokens."""
    if vocabulary <= len(SPECIAL):
        raise ValueError(f"vocabulary={vocabulary}: give more than the {len(SPECIAL)} special tokens.")
