import pytest

from tests.helpers.texts import PARTS, loaded, real, sentences, texts
from workbench.data import Sentences, TextClassification


def test_sentences_of_several_files(lines, tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("\n".join(sentences(20, 5)) + "\n\n")
    module = Sentences([str(lines), str(lines)], tokenizer, batch_size=4, validation=0.2, test=0.1)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 56, "val": 16, "test": 8}
    batch = loaded(module, "val")[0]
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert texts(module, "train")[0].startswith("<unk> <unk> <unk>")
    plain = Sentences([str(tmp_path / "plain.txt")], labelled=False)
    every = sorted(text for part in PARTS for text in texts(plain, part))
    assert every == sorted(f"[CLS] {text} [SEP]" for text in sentences(20, 5))
    for wrong in ([], str(lines)):
        with pytest.raises(ValueError, match="give a list of one or more text files"):
            Sentences(wrong)


@pytest.mark.data
def test_mr_and_subj():
    paths = [real("mr", "rt-polarity.all"), real("subj", "subj.all")]
    module = Sentences(paths)
    assert sum(len(data) for data in module.parts.values()) == 20_662
    module = TextClassification(paths[0])
    assert module.classes == 2
    assert module.parts["train"].extras["labels"].bincount().tolist() == [4265, 4265]
