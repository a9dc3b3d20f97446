import json
import subprocess
import sys

import pytest

from tests.helpers.texts import loaded, rows, texts
from workbench.data import TextClassification


def test_the_tokenizer_is_learnt_from_training_alone_and_alike_in_every_process(intents, tmp_path):
    content = json.loads(intents.read_text())
    content["test"][0][0] = "unheard words"
    intents.write_text(json.dumps(content))
    module = TextClassification(intents, vocabulary=12)
    assert list(module.vocabulary)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert list(module.vocabulary.values()) == list(range(12))
    assert texts(module, "test")[0] == "[CLS] [UNK] [UNK] [SEP]"
    assert module.tokenizer != TextClassification(intents, vocabulary=11).tokenizer
    assert module.tokenizer != TextClassification(intents, vocabulary=12, length=5).tokenizer
    code = (
        "import sys; from workbench.data import Sentences, TextClassification as T, TextSequences, TextStream\n"
        "print({'datasets', 'pyarrow'} & {*sys.modules})\n"
        "for kind in ('word', 'bpe'): print(T(sys.argv[1], tokenizer=kind, vocabulary=60).tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code, intents], capture_output=True, text=True, check=True)
    here = [TextClassification(intents, tokenizer=kind, vocabulary=60).tokenizer for kind in ("word", "bpe")]
    assert done.stdout.splitlines() == ["set()", *here], "and nothing was imported that was not needed"


def test_pieces_of_words(intents):
    module = TextClassification(intents, tokenizer="bpe", vocabulary=30)
    assert len(module.vocabulary) == 30
    text = texts(module, "val")[0].removeprefix("[CLS] ").removesuffix(" [SEP]")
    assert text.replace(" ", "") == rows(6, 1)[0][0].replace(" ", "")


def test_a_tokenizer_from_a_folder(intents, tokenizer):
    module = TextClassification(intents, tokenizer=tokenizer, batch_size=6)
    assert module.vocabulary["cat"] == 3
    assert texts(module, "val") == [text for text, _ in rows(6, 1)]
    (batch,) = loaded(module, "val")
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all(), "the end token pads"
    with pytest.raises(ValueError, match="nowhere: no tokenizer can be loaded from there"):
        TextClassification(intents, tokenizer="/nowhere").setup()
