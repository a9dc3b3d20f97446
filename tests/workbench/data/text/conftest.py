import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.texts import PARTS, WORDS, rows, sentences


@pytest.fixture
def intents(tmp_path):
    path = tmp_path / "intents.json"
    content = {"val": rows(6, 1), "train": rows(30), "test": rows(9, 2)}
    content |= {f"oos_{part}": [[text, "oos"] for text in sentences(4, 3)] for part in PARTS}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def lines(tmp_path):
    """As MR and SUBJ are: not UTF-8, and with a byte inside a line that Unicode would end it at."""
    path = tmp_path / "lines.all"
    path.write_bytes(
        b"".join(b"%d fine \x85 caf\xe9 %s .\n" % (i % 2, text.encode()) for i, text in enumerate(sentences(40)))
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer whose end token is its padding, too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return str(folder)
